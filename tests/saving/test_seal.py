"""Damage to an adapter's files is seen, by PEFT's own loading too; what may change by hand may."""

import hashlib
import json
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_talora import ConvLoraConfig, TALoraConfig
from peft_talora.saving.seal import FORMAT, check_format, check_seal, has_seal, seal

VALUES = {"r": 3, "scaling": 0.5, "tasks": ["b", "a"], "base_model_name_or_path": "somebody/sam", "revision": None}


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    seal(tmp_path / "config.json", tmp_path / "weights.bin")
    return tmp_path / "config.json"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestSeal:
    def test_holds_the_checksums(self, sealed):
        values = json.loads(sealed.read_text())
        entry = values.pop("saved_by")
        assert values == VALUES and entry["package"] == "peft_talora" and entry["format"] == FORMAT == 1
        assert "import peft_talora" in entry["note"] and "from_adapter" in entry["note"]
        weights = hashlib.sha256((sealed.parent / "weights.bin").read_bytes()).hexdigest()
        entry["sha256"].pop("config.json")
        assert entry["sha256"] == {"weights.bin": weights}
        # the documented rule, written down once more
        del values["base_model_name_or_path"], values["revision"]
        own = hashlib.sha256(json.dumps({**values, "saved_by": entry}, sort_keys=True).encode()).hexdigest()
        assert json.loads(sealed.read_text())["saved_by"]["sha256"]["config.json"] == own

    def test_sealing_again_changes_nothing(self, sealed):
        first = sealed.read_text()
        seal(sealed, sealed.parent / "weights.bin")
        assert sealed.read_text() == first

    def test_what_may_change(self, sealed):
        edit(sealed, base_model_name_or_path="/moved/sam", revision="v2")
        check_seal(sealed)
        values = json.loads(sealed.read_text())
        sealed.write_text(json.dumps(dict(reversed(values.items())), indent=7))
        check_seal(sealed)

    @pytest.mark.parametrize("change", [{"r": 4}, {"r": 3.0}, {"tasks": ["a", "b"]}, {"scaling": 0.7}, {"new": 1}])
    def test_changed_values(self, sealed, change):
        edit(sealed, **change)
        with pytest.raises(ValueError, match=r"config\.json is not as it was saved: .*verify=False.*`saved_by`"):
            check_seal(sealed)

    def test_changed_weights(self, sealed):
        weights = sealed.parent / "weights.bin"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        check_seal(sealed, skip=["weights.bin"])
        with pytest.raises(ValueError, match=r"weights\.bin is not as it was saved"):
            check_seal(sealed)
        weights.unlink()  # not there yet: PEFT loads it from the Hub after the configuration
        check_seal(sealed)

    def test_without_a_seal(self, sealed):
        assert has_seal(sealed)
        edit(sealed, saved_by=None, r=5)
        assert not has_seal(sealed)
        check_seal(sealed)

    @pytest.mark.parametrize("entry", [3, [], {"format": 1}, {"format": 1, "sha256": {"weights.bin": "0"}}])
    def test_a_damaged_seal(self, sealed, entry):
        edit(sealed, saved_by=entry)
        with pytest.raises(ValueError, match=r"config\.json is damaged: its entry `saved_by`"):
            check_seal(sealed)

    def test_a_newer_format(self, sealed):
        edit(sealed, saved_by={"format": 2})
        for check in (check_format, check_seal):
            with pytest.raises(
                ValueError, match=r"config\.json was saved in format 2, .* up to 1\. Upgrade peft_talora"
            ):
                check(sealed)

    @pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\xff"])
    def test_what_is_no_json_object(self, tmp_path, text):
        path = tmp_path / "config.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"config\.json cannot be read"):
            check_seal(path)

    def test_nothing_outside_the_directory_is_read(self, sealed):
        (sealed.parent / "inner").mkdir()
        inner = sealed.parent / "inner" / "config.json"
        inner.write_text("{}")
        seal(inner)
        values = json.loads(inner.read_text())
        values["saved_by"]["sha256"]["../weights.bin"] = "0"
        inner.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"inner/config\.json is not as it was saved"):
            check_seal(inner)


def configs():
    return [TALoraConfig(tasks=["b", "a"], r=3, scaling=0.25), ConvLoraConfig(r=2, grid_size=(2, 3))]


class TestThroughPeft:
    """What PEFT saves and loads by itself, with the tuners' configurations."""

    @pytest.mark.parametrize("config", configs(), ids=lambda config: config.peft_type.value)
    def test_a_configuration_comes_back(self, tmp_path, config):
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["saved_by"]["format"] == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT would warn of an entry that it does not know
            for loaded in (PeftConfig.from_pretrained(tmp_path), type(config).from_pretrained(tmp_path)):
                assert loaded == config and loaded.saved_by is None

    @pytest.mark.parametrize("config", configs(), ids=lambda config: config.peft_type.value)
    def test_a_changed_configuration(self, tmp_path, config):
        config.save_pretrained(tmp_path)
        edit(tmp_path / "adapter_config.json", r=5)
        with pytest.raises(ValueError, match=r"adapter_config\.json is not as it was saved"):
            type(config).from_pretrained(tmp_path)
        edit(tmp_path / "adapter_config.json", saved_by=None)  # as the error says
        assert type(config).from_pretrained(tmp_path).r == 5

    def test_of_an_older_version(self, tmp_path):
        config = configs()[0]
        values = {**config.to_dict(), "peft_type": "TALORA"}
        del values["saved_by"]
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        assert TALoraConfig.from_pretrained(tmp_path) == config

    def test_a_model(self, sam_factory, tmp_path):
        model = get_peft_model(sam_factory(), TALoraConfig(tasks=["a", "b"], r=2, init_weights=False))
        model.save_pretrained(tmp_path)
        # PEFT's own save says nothing about the weights, save_adapter does: see test_hub.py
        assert list(json.loads((tmp_path / "adapter_config.json").read_text())["saved_by"]["sha256"]) == [
            "adapter_config.json"
        ]
        PeftModel.from_pretrained(sam_factory(), tmp_path)
        seal(tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors")
        loaded = PeftModel.from_pretrained(sam_factory(), tmp_path)
        expected = model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not as it was saved"):
            PeftModel.from_pretrained(sam_factory(), tmp_path)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not as it was saved"):
            model.load_adapter(tmp_path, "second")

    def test_saving_over_a_sealed_one(self, sam_factory, tmp_path):
        """No checksum of weights that were there before is left over."""
        sam = sam_factory()
        model = get_peft_model(sam, TALoraConfig(tasks=["a", "b"], r=2))
        model.save_pretrained(tmp_path)
        seal(tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors")
        plain = sam_factory()
        plain.add_adapter(TALoraConfig(tasks=["a", "b"], r=2, init_weights=False))
        plain.save_pretrained(tmp_path)  # transformers writes the configuration before the weights
        loaded = PeftModel.from_pretrained(sam_factory(), tmp_path)
        expected = plain.vision_encoder.layers[0].attn.qkv.talora_U1["default"]
        got = loaded.base_model.model.vision_encoder.layers[0].attn.qkv.talora_U1["default"]
        assert torch.equal(got, expected)
