"""Damage to an adapter's weights is seen, by PEFT's own loading too; a configuration may be changed by hand."""

import hashlib
import json
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_talora import ConvLoraConfig, TALoraConfig
from peft_talora.saving.seal import FORMAT, WEIGHTS_FILE, has_weights, parse_json, read_json, seal

VALUES = {"r": 3, "scaling": 0.5, "tasks": ["b", "a"], "base_model_name_or_path": "somebody/sam", "revision": None}
CONTENT = bytes(range(256)) * 50


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / WEIGHTS_FILE).write_bytes(CONTENT)
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    seal(tmp_path / "config.json", settings={"scaling": 0.5}, weights=tmp_path / WEIGHTS_FILE)
    return tmp_path / "config.json"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestSeal:
    def test_holds_the_weights_checksum(self, sealed):
        values = json.loads(sealed.read_text())
        entry = values.pop("saved_by")
        assert values == VALUES and entry["package"] == "peft_talora" and entry["format"] == FORMAT == 1
        assert "import peft_talora" in entry["note"] and "from_adapter" in entry["note"]
        assert entry["sha256"] == {WEIGHTS_FILE: hashlib.sha256(CONTENT).hexdigest()}
        assert entry["settings"] == {"scaling": 0.5}

    def test_sealing_again_keeps_what_is_there(self, sealed):
        first = sealed.read_text()
        seal(sealed)
        assert sealed.read_text() == first

    def test_which_weights(self, sealed):
        values = read_json(sealed)
        assert has_weights(values, CONTENT) and not has_weights(values, CONTENT[:-1] + b"x")
        edit(sealed, r=4, scaling=0.7, new=1, tasks=["a", "b"])
        assert has_weights(read_json(sealed), CONTENT)

    @pytest.mark.parametrize("entry", [None, 3, [], {"format": 1}, {"format": 1, "sha256": {"config.json": "0"}}])
    def test_without_a_checksum(self, sealed, entry):
        edit(sealed, saved_by=entry)
        assert has_weights(read_json(sealed), b"any")

    def test_a_newer_format(self, sealed):
        edit(sealed, saved_by={"format": 2})
        with pytest.raises(ValueError, match=r"config\.json was saved in format 2, .* up to 1\. Upgrade peft_talora"):
            read_json(sealed)

    @pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\xff", '{"a": ' + "1" * 5000 + "}"])
    def test_what_is_no_json_object(self, tmp_path, text):
        path = tmp_path / "config.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"config\.json cannot be read"):
            read_json(path)

    def test_a_file_that_is_far_too_long(self, tmp_path):
        with pytest.raises(ValueError, match=r"config\.json cannot be read: it has 10,000,001 bytes"):
            parse_json(b" " * 10_000_001, tmp_path / "config.json")


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
                assert loaded.settings_on_file == loaded.settings()

    @pytest.mark.parametrize("config", configs(), ids=lambda config: config.peft_type.value)
    def test_a_changed_configuration(self, tmp_path, config):
        config.save_pretrained(tmp_path)
        edit(tmp_path / "adapter_config.json", r=5)
        assert type(config).from_pretrained(tmp_path).r == 5

    def test_a_newer_version_s(self, tmp_path):
        configs()[0].save_pretrained(tmp_path)
        edit(tmp_path / "adapter_config.json", saved_by={"format": 2})
        with pytest.raises(ValueError, match=r"adapter_config\.json was saved in format 2"):
            TALoraConfig.from_pretrained(tmp_path)

    def test_of_an_older_version(self, tmp_path):
        config = configs()[0]
        values = {**config.to_dict(), "peft_type": "TALORA"}
        del values["saved_by"], values["active_task"]
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        assert TALoraConfig.from_pretrained(tmp_path) == config

    def test_a_model(self, sam_factory, tmp_path):
        model = get_peft_model(sam_factory(), TALoraConfig(tasks=["a", "b"], r=2, init_weights=False))
        model.save_pretrained(tmp_path)
        # PEFT's own save says nothing about the weights, save_adapter does: see test_hub.py
        assert "sha256" not in json.loads((tmp_path / "adapter_config.json").read_text())["saved_by"]
        PeftModel.from_pretrained(sam_factory(), tmp_path)
        seal(tmp_path / "adapter_config.json", weights=tmp_path / WEIGHTS_FILE)
        loaded = PeftModel.from_pretrained(sam_factory(), tmp_path)
        expected = model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        tensors = load_file(tmp_path / WEIGHTS_FILE)
        next(value for value in tensors.values() if value.numel()).view(-1)[0] += 1
        save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not as it was saved"):
            PeftModel.from_pretrained(sam_factory(), tmp_path)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not as it was saved"):
            model.load_adapter(tmp_path, "second")

    def test_sizes_that_are_not_the_weights(self, sam_factory, tmp_path):
        for config in (TALoraConfig(tasks=["a", "b"], r=2), ConvLoraConfig(r=2)):
            get_peft_model(sam_factory(), config).save_pretrained(tmp_path)
            edit(tmp_path / "adapter_config.json", r=10**9)
            with pytest.raises(
                ValueError, match=r"tensor '.*' has another shape than in the configuration: .*1000000000"
            ):
                PeftModel.from_pretrained(sam_factory(), tmp_path)

    def test_saving_over_a_sealed_one(self, sam_factory, tmp_path):
        """No checksum of weights that were there before is left over."""
        sam = sam_factory()
        model = get_peft_model(sam, TALoraConfig(tasks=["a", "b"], r=2))
        model.save_pretrained(tmp_path)
        seal(tmp_path / "adapter_config.json", weights=tmp_path / WEIGHTS_FILE)
        plain = sam_factory()
        plain.add_adapter(TALoraConfig(tasks=["a", "b"], r=2, init_weights=False))
        plain.save_pretrained(tmp_path)  # transformers writes the configuration before the weights
        loaded = PeftModel.from_pretrained(sam_factory(), tmp_path)
        expected = plain.vision_encoder.layers[0].attn.qkv.talora_U1["default"]
        got = loaded.base_model.model.vision_encoder.layers[0].attn.qkv.talora_U1["default"]
        assert torch.equal(got, expected)
