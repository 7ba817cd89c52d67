"""Damaged weights load as they were saved, or are refused with an error that names a file; nothing else is raised."""

import copy
import json
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_talora import (
    MSamForMultiTask,
    TALoraConfig,
    TaskSpec,
    default_modules_to_save,
    load_adapter,
    save_adapter,
)
from peft_talora.saving import adapter as adapter_module
from peft_talora.saving.settings import split_settings
from peft_talora.saving.tensors import weightless_twin

CONFIG, WEIGHTS, MSAM = "adapter_config.json", "adapter_model.safetensors", "msam.json"
TASKS = {"semantic": TaskSpec("semantic", num_channels=2, class_names=["a", "b"]), "depth": TaskSpec("depth")}


@pytest.fixture
def tiny_sam(sam_factory):
    return sam_factory(image_size=8, hidden_size=8, num_hidden_layers=1, global_attn_indexes=[0], window_size=2)


def talora(msam):
    return TALoraConfig(r=2, r_task=2, init_weights=False)


def lora(msam):
    modules_to_save = default_modules_to_save(msam)
    return LoraConfig(r=2, target_modules=["qkv"], modules_to_save=modules_to_save, init_lora_weights=False)


# --- What happens to the bytes of any file ---------------------------------------------------------------------------


def flip_bits(data, rng):
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def replace_a_digit(data, rng):
    digits = [index for index, byte in enumerate(data) if chr(byte).isdigit()]
    data[rng.choice(digits)] = ord(rng.choice("0123456789"))


def truncate(data, rng):
    del data[rng.randrange(len(data)) :]


def cut_out(data, rng):
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 64)]


def insert(data, rng):
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.randint(1, 64))


def overwrite(data, rng):
    size = rng.randint(1, 64)
    start = rng.randrange(len(data) - size)
    data[start : start + size] = bytes(size)


def exchange(data, rng):
    size = rng.randint(1, 32)
    first, second = sorted(rng.sample(range(0, len(data) - size, size), 2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )


BYTES = [flip_bits, flip_bits, replace_a_digit, truncate, cut_out, insert, overwrite, exchange]

# --- What happens to a JSON file that stays one ----------------------------------------------------------------------


def entries(values):
    """Every (container, key) in a JSON object."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(pairs):
        yield values, key
        if isinstance(value, dict | list):
            yield from entries(value)


def exchange_values(values, rng):
    (first, a), (second, b) = rng.sample(list(entries(values)), 2)
    # a value cannot be put into itself
    if isinstance(first[a], dict | list) or isinstance(second[b], dict | list):
        first, second = values, values
        a, b = rng.sample(list(values), 2)
    first[a], second[b] = second[b], first[a]


def change_number(values, rng):
    numbers = [(c, k) for c, k in entries(values) if isinstance(c[k], int | float)]
    container, key = rng.choice(numbers)
    container[key] = rng.choice([container[key] + 1, 0, -1, 0.7, 10**12, True, str(container[key])])


def remove_entry(values, rng):
    container, key = rng.choice(list(entries(values)))
    del container[key]


def rename_entry(values, rng):
    container, key = rng.choice([(c, k) for c, k in entries(values) if isinstance(c, dict)])
    container[f"{key}_"] = container.pop(key)


JSON = [exchange_values, change_number, remove_entry, rename_entry]

# --- What happens to tensors in a file that stays one ----------------------------------------------------------------


def change_one_value(tensors, rng):
    flat = tensors[rng.choice(sorted(tensors))].view(-1)
    flat[rng.randrange(len(flat))] += rng.choice([1e-6, 1.0, float("nan"), float("inf")])


def exchange_tensors(tensors, rng):
    first = rng.choice(sorted(tensors))
    second = rng.choice([name for name in sorted(tensors) if name != first])
    tensors[first], tensors[second] = tensors[second], tensors[first]


def remove_tensor(tensors, rng):
    del tensors[rng.choice(sorted(tensors))]


def change_type(tensors, rng):
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].to(rng.choice([torch.int32, torch.bfloat16, torch.float8_e4m3fn]))


TENSORS = [change_one_value, exchange_tensors, remove_tensor, change_type]


def damage(path, rng):
    """Change the file, in a way that `rng` chooses; the name of the way."""
    if rng.random() < 0.6:
        way, data = rng.choice(BYTES), bytearray(path.read_bytes())
        way(data, rng)
        path.write_bytes(data)
    elif path.suffix == ".json":
        way, values = rng.choice(JSON), json.loads(path.read_text())
        way(values, rng)
        path.write_text(json.dumps(values))
    else:
        way, tensors = rng.choice(TENSORS), load_file(path)
        way(tensors, rng)
        save_file(tensors, path, metadata={"format": "pt"})
    return way.__name__


def content(model, pixels):
    """Everything that an adapter brings, and what the model makes of it."""
    config = model.peft_config["default"].to_dict()
    del config["base_model_name_or_path"], config["revision"]
    return config, weights_of(model), predictions(model, pixels)


def weights_of(model):
    return split_settings(get_peft_model_state_dict(model, save_embedding_layers=False))[0]


@torch.no_grad()
def predictions(model, pixels):
    return model(pixels).logits


def assert_equal(tensors, others):
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in others)


@pytest.fixture
def remembered(monkeypatch):
    """What an adapter should hold depends on its configuration alone: it is worked out once for all cases."""
    known = {}

    def twin_of(model, config):
        key = str(config.to_dict())
        if key not in known:
            known[key] = weightless_twin(model, config)
        return known[key]

    monkeypatch.setattr(adapter_module, "weightless_twin", twin_of)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make_config", "cases"), [(talora, 150), (lora, 60)])
def test_damage_is_harmless_or_refused(tiny_sam, tmp_path, remembered, make_config, cases):
    """Damaged weights load as they were saved, or are refused. A damaged configuration loads only with these weights."""
    base = MSamForMultiTask.from_sam(tiny_sam, TASKS)
    path = save_adapter(get_peft_model(copy.deepcopy(base), make_config(base)), tmp_path / "adapter")
    names = [name for name in (CONFIG, WEIGHTS, MSAM) if (path / name).exists()]
    pixels = torch.randn(1, 3, 8, 8)
    config, weights, logits = content(load_adapter(path, base_model=copy.deepcopy(base)), pixels)
    loaded, refused = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for case in range(cases):
        rng = random.Random(case)
        file = path / rng.choice(names)
        original = file.read_bytes()
        way = damage(file, rng)
        try:
            model = load_adapter(path, base_model=base)
        except ValueError as error:
            assert any(str(path / name) in str(error) for name in names), f"case {case}, {way}: {error}"
            refused[file.name] += 1
        else:
            loaded[file.name] += 1
            assert_equal(weights_of(model), weights)
            if file.name == WEIGHTS:
                assert content(model, pixels)[0] == config
                assert_equal(predictions(model, pixels), logits)
            base = MSamForMultiTask.from_sam(tiny_sam, TASKS)  # the other one is tuned now
        file.write_bytes(original)
    # a digit may be replaced by itself
    assert refused[WEIGHTS] > 0.9 * (refused[WEIGHTS] + loaded[WEIGHTS]) and all(refused.values()), (loaded, refused)
    assert loaded[CONFIG]  # what is edited by hand, and fits
    assert_equal(predictions(load_adapter(path, base_model=base), pixels), logits)
