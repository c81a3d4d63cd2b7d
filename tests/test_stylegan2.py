"""The networks against an independent float64 restatement, and other people's files against networks whose output is known."""
import argparse
import io
import math
import os
import pickle
import sys
import types

import numpy as np
import pytest
import scipy.signal
import torch

from dermgan.core import DataMissing, DataRefused, save_weights
from dermgan.stylegan2 import (Discriminator, Generator, load_generator, load_nvlabs, load_rosinality, save_generator, save_rosinality,
                               synthesize)

TINY = dict(image_px=16, z_dim=6, w_dim=7, channel_base=96, channel_max=9, mapping_layers=3)


def shaken(net, seed=0):
    "Every parameter and buffer drawn, so that none is left at a start value that hides it."
    g = torch.Generator().manual_seed(seed)
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=g).to(tensor)
    return net.eval()


def pair(**changes):
    shape = TINY | changes
    return (shaken(Generator(**shape)).requires_grad_(False),
            shaken(Discriminator(shape["image_px"], shape["channel_base"], shape["channel_max"]), 1).requires_grad_(False))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the restatement: numpy, one sample at a time, straight from the formulas

def lrelu(x):
    return np.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def dense(p, name, x, multiplier=1.0):
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return weight @ x * multiplier / math.sqrt(weight.shape[1]) + bias * multiplier


def resample(x, up=1, down=1, pad=(0, 0), gain=1.0):
    f = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64 * gain
    planes = []
    for plane in x:
        spread = np.zeros([n * up for n in plane.shape])
        spread[::up, ::up] = plane
        planes.append(scipy.signal.convolve2d(np.pad(spread, pad), f, "valid")[::down, ::down])
    return np.stack(planes)


def correlate(x, weight, mode="same"):
    return np.stack([sum(scipy.signal.correlate2d(x[c], f[c], mode) for c in range(len(x))) for f in weight])


def style_layer(p, name, x, w, up):
    style = dense(p, f"{name}.affine", w)
    kernel = p[f"{name}.weight"] * style[None, :, None, None]
    kernel = kernel / np.sqrt((kernel**2).sum((1, 2, 3), keepdims=True) + 1e-8)
    if up:
        size = x.shape[1]
        y = np.zeros((len(kernel), 2 * size + 1, 2 * size + 1))
        for a in range(3):
            for b in range(3):
                y[:, a:a + 2 * size:2, b:b + 2 * size:2] += np.einsum("oi,ihw->ohw", kernel[:, :, a, b], x)
        x = resample(y, pad=(1, 1), gain=4)
    else:
        x = correlate(x, kernel)
    return lrelu(x + p[f"{name}.noise_strength"] * p[f"{name}.noise_const"] + p[f"{name}.bias"][:, None, None])


def restated_generator(p, z, layers, px, truncation):
    x = z / np.sqrt((z**2).mean() + 1e-8)
    for i in range(layers):
        x = lrelu(dense(p, f"mapping.fc{i}", x, 0.01))
    w = p["mapping.w_avg"] + truncation * (x - p["mapping.w_avg"])
    x, image = p["synthesis.b4.const"], None
    for r in [2**i for i in range(2, int(math.log2(px)) + 1)]:
        name = f"synthesis.b{r}"
        if r > 4:
            x = style_layer(p, f"{name}.conv0", x, w, True)
        x = style_layer(p, f"{name}.conv1", x, w, False)
        style = dense(p, f"{name}.torgb.affine", w) / math.sqrt(len(x))
        rgb = np.einsum("oi,i,ihw->ohw", p[f"{name}.torgb.weight"][:, :, 0, 0], style, x) + p[f"{name}.torgb.bias"][:, None, None]
        image = rgb if image is None else resample(image, up=2, pad=(2, 1), gain=4) + rgb
    return image


def critic_conv(p, name, x, down=False):
    weight = p[f"{name}.weight"]
    weight = weight / math.sqrt(np.prod(weight.shape[1:]))
    if down:
        k = weight.shape[2]
        x = resample(x, down=2, pad=(1, 1)) if k == 1 else resample(x, pad=(2, 2))
        return correlate(x, weight, "valid")[:, :: 1 if k == 1 else 2, :: 1 if k == 1 else 2]
    return correlate(x, weight)


def restated_critic(p, images, px):
    rows = []
    for x in images:
        x = lrelu(critic_conv(p, f"b{px}.fromrgb", x) + p[f"b{px}.fromrgb.bias"][:, None, None])
        for r in [2**i for i in range(int(math.log2(px)), 2, -1)]:
            y = lrelu(critic_conv(p, f"b{r}.conv0", x) + p[f"b{r}.conv0.bias"][:, None, None])
            y = lrelu(critic_conv(p, f"b{r}.conv1", y, True) + p[f"b{r}.conv1.bias"][:, None, None])
            x = (y + critic_conv(p, f"b{r}.skip", x, True)) * math.sqrt(0.5)
        rows.append(x)
    rows, logits = np.stack(rows), []
    size = min(4, len(rows))
    for n, x in enumerate(rows):
        deviation = np.sqrt(rows[[m for m in range(len(rows)) if m // size == n // size]].var(0) + 1e-8).mean()
        x = np.concatenate([x, np.full((1, 4, 4), deviation)])
        x = lrelu(critic_conv(p, "b4.conv", x) + p["b4.conv.bias"][:, None, None])
        logits.append(dense(p, "b4.out", lrelu(dense(p, "b4.fc", x.reshape(-1)))))
    return np.stack(logits)


def arrays(net):
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("changes", [{}, dict(mapping_layers=1, z_dim=3), dict(image_px=8, channel_max=5), dict(image_px=32, channel_base=64)])
def test_networks_equal_their_formulas(changes):
    g, d = (net.double() for net in pair(**changes))
    z = draw(5, g.z_dim).double()
    for truncation in (1.0, 0.7):
        images = g(z[:2], truncation, "const")
        expected = np.stack([restated_generator(arrays(g), row.numpy(), g.shape["mapping_layers"], g.image_px, truncation) for row in z[:2]])
        assert np.abs(images.numpy() - expected).max() < 1e-9 * np.abs(expected).max()
    for n in (3, 8):
        batch = draw(n, 3, g.image_px, g.image_px, seed=n).double()
        expected = restated_critic(arrays(d), batch.numpy(), g.image_px)
        assert np.abs(d(batch).numpy() - expected).max() < 1e-9 * np.abs(expected).max()


def test_mapping_sees_the_direction_of_z_only():
    g, _ = pair()
    z = draw(9, g.z_dim)
    assert torch.allclose(g.mapping(z), g.mapping(7 * z), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("px", [16, 64, 256, 1024])
def test_style_inputs_and_sizes(px):
    g = Generator(px, 8, 8, channel_base=64, channel_max=4, mapping_layers=1)
    assert g.num_ws == 2 * int(math.log2(px)) - 2
    if px <= 64:
        images = synthesize(g.synthesis, torch.zeros(2, g.num_ws, 8), "none")
        assert [image.shape[2] for image in images] == [2**i for i in range(2, int(math.log2(px)) + 1)]
        assert Discriminator(px, 64, 4)(images[-1]).shape == (2, 1)


def test_each_style_input_moves_its_own_layers_only():
    g, _ = pair()
    ws = draw(1, 1, g.w_dim).repeat(1, g.num_ws, 1)
    first = synthesize(g.synthesis, ws, "const")
    for layer in range(g.num_ws):
        moved = ws.clone()
        moved[:, layer] += 1
        changed = [not torch.equal(a, b) for a, b in zip(first, synthesize(g.synthesis, moved, "const"))]
        block = max(0, (layer - 1) // 2) if layer % 2 or layer == 0 else layer // 2
        assert changed == [i >= block for i in range(len(changed))], layer


def test_wrong_shapes_are_refused_in_words():
    g, d = pair()
    with pytest.raises(ValueError, match="power of two"):
        Generator(48)
    with pytest.raises(ValueError, match=r"\[N, 6, w_dim\]"):
        g.synthesis(torch.zeros(1, 5, 7))
    with pytest.raises(ValueError, match=r"\[N, 3, 16, 16\]"):
        d(torch.zeros(1, 3, 8, 8))


# --- files

def test_published_generator_comes_back(tmp_path):
    g, _ = pair()
    z = draw(3, g.z_dim)
    exact = load_generator(save_generator(tmp_path / "g.safetensors", g))
    half = load_generator(save_generator(tmp_path / "h.safetensors", g, {"data": "none"}, torch.float16))
    assert exact.shape == g.shape and torch.equal(exact(z, 0.5, "const"), g(z, 0.5, "const"))
    assert not exact.training and not any(p.requires_grad for p in exact.parameters())
    assert (half(z, 1, "const") - g(z, 1, "const")).abs().max() < 0.02 * g(z, 1, "const").abs().max()


def test_loading_draws_no_random_number(tmp_path):
    g, d = pair()
    save_generator(tmp_path / "g.safetensors", g)
    save_rosinality(tmp_path / "g.pt", g, d)
    torch.manual_seed(5)
    load_generator(tmp_path / "g.safetensors"), load_rosinality(tmp_path / "g.pt")
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("layers,px", [(1, 8), (2, 16), (8, 32)])
def test_rosinality_there_and_back(tmp_path, layers, px):
    g, d = pair(mapping_layers=layers, image_px=px, z_dim=7)
    theirs, critic = load_rosinality(save_rosinality(tmp_path / "550000.pt", g, d))
    z, images = draw(4, 7), draw(4, 3, px, px)
    assert torch.equal(theirs(z, 0.7, "const"), g(z, 0.7, "const"))
    assert torch.equal(critic(images), d(images)) and torch.equal(theirs.w_avg, g.w_avg)
    assert load_rosinality(save_rosinality(tmp_path / "g.pt", g))[1] is None


def test_rosinality_layout_is_the_published_one(tmp_path):
    g, d = pair(image_px=8, z_dim=7, mapping_layers=1)
    stored = torch.load(save_rosinality(tmp_path / "g.pt", g, d), weights_only=True)
    shapes = {name: tuple(t.shape) for name, t in stored["g_ema"].items()}
    c = 9
    assert shapes["input.input"] == (1, c, 4, 4) and shapes["conv1.conv.weight"] == (1, c, c, 3, 3)
    assert shapes["to_rgb1.bias"] == (1, 3, 1, 1) and shapes["to_rgbs.0.conv.weight"] == (1, 3, c, 1, 1)
    assert shapes["convs.0.noise.weight"] == (1,) and shapes["noises.noise_2"] == (1, 1, 8, 8)
    assert shapes["convs.1.conv.modulation.weight"] == (c, 7) and shapes["convs.1.activate.bias"] == (c,)
    assert stored["g_ema"]["convs.0.conv.blur.kernel"].sum() == 4 and "convs.1.conv.blur.kernel" not in shapes
    assert torch.equal(stored["g_ema"]["style.1.weight"], g.mapping.fc0.weight)
    assert {"convs.0.0.weight", "convs.0.1.bias", "convs.1.conv1.0.weight", "convs.1.conv2.0.kernel", "convs.1.conv2.1.weight",
            "convs.1.conv2.2.bias", "convs.1.skip.1.weight", "final_conv.0.weight", "final_linear.1.bias"} <= set(stored["d"])


def test_a_training_checkpoint_with_its_arguments_loads(tmp_path):
    g, d = pair()
    stored = torch.load(save_rosinality(tmp_path / "g.pt", g, d), weights_only=True)
    stored["g"] = {name: t + 1 for name, t in stored["g_ema"].items() if not name.endswith("kernel")}
    del stored["latent_avg"]
    optimizer = torch.optim.Adam(Discriminator(8, 8, 2).parameters())
    torch.save(stored | {"args": argparse.Namespace(size=16, lr=0.002), "d_optim": optimizer.state_dict(), "ada_aug_p": 0.1}, tmp_path / "t.pt")
    theirs, _ = load_rosinality(tmp_path / "t.pt")
    again, _ = load_rosinality(tmp_path / "t.pt")
    assert torch.equal(theirs.mapping.fc0.weight, g.mapping.fc0.weight)
    codes = g.mapping(draw(100_000, g.z_dim, seed=3))
    assert torch.equal(theirs.w_avg, again.w_avg) and ((theirs.w_avg - codes.mean(0)).abs() < 5 * codes.std(0) / 64).all()


def spoilt(stored, change):
    g = stored["g_ema"]
    if change == "label":
        g["embed.weight"] = torch.zeros(7, 7)
    if change == "short":
        del g["convs.1.conv.weight"]
    if change == "nan":
        g["convs.1.conv.weight"][0, 0, 0, 0, 0] = math.nan
    if change == "filter":
        g["convs.0.conv.blur.kernel"] = torch.eye(4)
    if change == "shape":
        g["convs.0.conv.weight"] = torch.zeros(1, 3, 3, 3, 3)
    if change == "bomb":
        g["style.1.weight"] = torch.zeros(1).expand(200_000, 200_000)
    if change == "far":
        g["to_rgbs.4000000.bias"] = torch.zeros(1, 3, 1, 1)
    return stored


@pytest.mark.parametrize("change,named", [("label", "embed.weight"), ("short", "convs.1.conv.weight"), ("nan", "not finite"),
                                          ("filter", "blur.kernel"), ("shape", "size mismatch"), ("bomb", "fc0.weight"), ("far", "to_rgbs.4000000")])
def test_other_rosinality_files_are_refused_by_name(tmp_path, change, named):
    g, d = pair(mapping_layers=1)
    stored = torch.load(save_rosinality(tmp_path / "g.pt", g, d), weights_only=True)
    torch.save(spoilt(stored, change), tmp_path / "bad.pt")
    with pytest.raises(DataRefused, match=named) as refusal:
        load_rosinality(tmp_path / "bad.pt")
    assert str(refusal.value).count("\n") == 2


# --- NVlabs' pickles, made with stand-ins of the same names

class Persistent:
    "Pickles as NVlabs' persistent classes do: a call of their reconstructor with source code and attributes."

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        import torch_utils.persistence as persistence
        source = "raise SystemExit('the source of a pickle was run')"
        meta = dict(type="class", version=6, module_src=source, class_name="Generator", state=self.state)
        return persistence._reconstruct_persistent_obj, (meta,), None


def persistent(module, **attributes):
    "A torch module as NVlabs' class of the same name would be pickled."
    state = {"training": False, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers),
             "_modules": {name: persistent(child) for name, child in module._modules.items() if child is not None},
             "weight_gain": np.float64(0.5), "ramp": np.arange(3.0), "_non_persistent_buffers_set": set()}
    if "conv0" in module._modules or "b4" in module._modules:
        f = torch.tensor([1.0, 3.0, 3.0, 1.0])
        state["_buffers"]["resample_filter"] = f[:, None] * f / 64
    return Persistent(state | attributes)


@pytest.fixture
def nvlabs(tmp_path):
    "A function that writes a pickle of two networks, with the modules it names importable only meanwhile."
    def reconstruct(meta):
        raise SystemExit("the reconstructor was run")

    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = reconstruct
    util.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    modules = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence,
               "dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util}

    def write(g, d, change=lambda stored: stored, group=4, protocol=4):
        path = tmp_path / "network-snapshot.pkl"
        critic = persistent(d)
        critic.state["_modules"]["b4"].state["_modules"]["mbstd"] = Persistent(
            {"_parameters": {}, "_buffers": {}, "_modules": {}, "group_size": group, "num_channels": 1})
        generator = persistent(g, _init_kwargs=util.EasyDict(z_dim=g.z_dim, c_dim=0))
        sys.modules.update(modules)
        try:
            stored = {"training_set_kwargs": {"path": "x"}, "G": generator, "D": critic, "G_ema": generator, "augment_pipe": None}
            path.write_bytes(pickle.dumps(change(stored), protocol))
        finally:
            for name in modules:
                del sys.modules[name]
        return path
    return write


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("layers,px", [(2, 8), (8, 32)])
def test_nvlabs_networks_are_read_without_their_code(nvlabs, protocol, layers, px):
    g, d = pair(mapping_layers=layers, image_px=px)
    theirs, critic = load_nvlabs(nvlabs(g, d, protocol=protocol))
    z, images = draw(4, g.z_dim), draw(4, 3, px, px)
    assert "torch_utils" not in sys.modules
    assert torch.equal(theirs(z, 0.7, "const"), g(z, 0.7, "const")) and torch.equal(critic(images), d(images))


def test_half_precision_and_parameters_are_read_as_float32(nvlabs):
    g, d = pair()
    theirs, _ = load_nvlabs(nvlabs(g.half(), d))
    assert all(p.dtype == torch.float32 for p in theirs.parameters())


def test_another_group_of_the_critic_is_said(nvlabs):
    g, d = pair()
    with pytest.warns(UserWarning, match="8 images"):
        _, critic = load_nvlabs(nvlabs(g, d, group=8))
    images = draw(4, 3, 16, 16)
    assert torch.equal(critic(images), d(images))


def without(name):
    def change(stored):
        del stored["G_ema"].state["_modules"]["mapping"].state["_buffers"][name]
        return stored
    return change


def test_a_mean_that_is_not_stored_is_drawn_with_a_fixed_seed(nvlabs):
    g, d = pair()
    path = nvlabs(g, d, without("w_avg"))
    first, second = load_nvlabs(path)[0], load_nvlabs(path)[0]
    codes = g.mapping(draw(100_000, g.z_dim, seed=3))
    assert torch.equal(first.w_avg, second.w_avg) and ((first.w_avg - codes.mean(0)).abs() < 5 * codes.std(0) / 64).all()


def conditional(stored):
    embed = {"_parameters": {"weight": torch.zeros(7, 7)}, "_buffers": {}, "_modules": {}}
    stored["G_ema"].state["_modules"]["mapping"].state["_modules"]["embed"] = Persistent(embed)
    return stored


def original_critic(stored):
    del stored["D"].state["_modules"]["b16"].state["_modules"]["skip"]
    return stored


def stylegan3(stored):
    del stored["G_ema"].state["_modules"]["synthesis"].state["_modules"]["b4"]
    return stored


def other_filter(stored):
    stored["G_ema"].state["_modules"]["synthesis"].state["_modules"]["b8"].state["_buffers"]["resample_filter"] = torch.ones(4, 4) / 16
    return stored


@pytest.mark.parametrize("change,named", [(conditional, "conditional"), (original_critic, "skip.weight"), (stylegan3, "no StyleGAN2"),
                                          (other_filter, "another filter"), (lambda s: {"G": s["G"]}, "lacks 'G_ema'"), (lambda s: [1, 2], "indices")])
def test_other_nvlabs_networks_are_refused_by_name(nvlabs, change, named):
    with pytest.raises(DataRefused, match=named) as refusal:
        load_nvlabs(nvlabs(*pair(), change))
    assert str(refusal.value).count("\n") == 2


class Trap:
    "Writes a file when it is unpickled by an ordinary reader."

    def __init__(self, path, call=os.system):
        self.path, self.call = path, call

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",)) if self.call is os.system else (self.call, (f"open({str(self.path)!r}, 'w')",))


def traps(path):
    inner = io.BytesIO()
    torch.save(Trap(path), inner)
    old = io.BytesIO()
    torch.save(Trap(path), old, _use_new_zipfile_serialization=False)
    text = str(path).encode()
    yield "a call", pickle.dumps({"G_ema": Trap(path)})
    yield "an evaluation", pickle.dumps({"G_ema": Trap(path, eval)})
    yield "an execution, protocol 0", pickle.dumps({"G_ema": Trap(path, exec)}, 0)
    yield "a trap after a network", pickle.dumps([{"G_ema": {}}, Trap(path)])
    for name, buffer in (("zip", inner), ("old", old)):
        yield f"a trap in the bytes of a tensor, {name}", pickle.dumps(Storage(buffer.getvalue()))
    yield "a name with dots", b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c" + bytes([len(b"touch " + text)]) + b"touch " + text + b"\x85R."
    yield "an object of a class", b"(S'touch " + text + b"'\nios\nsystem\n."
    yield "getattr", b"\x80\x02c__builtin__\ngetattr\n(c__builtin__\ndict\nX\x03\x00\x00\x00getR."


class Storage:
    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


def test_traps_are_refused_and_do_not_spring(tmp_path):
    sprung = tmp_path / "sprung"
    for name, data in traps(sprung):
        (tmp_path / "trap.pkl").write_bytes(data)
        for load in (load_nvlabs, load_rosinality):
            with pytest.raises(DataRefused) as refusal:
                load(tmp_path / "trap.pkl")
            assert str(refusal.value).count("\n") == 2, name
        assert not sprung.exists(), name
    torch.save({"g_ema": Trap(sprung)}, tmp_path / "trap.pt")
    with pytest.raises(DataRefused, match="system") as refusal:
        load_rosinality(tmp_path / "trap.pt")
    assert "trusted" not in str(refusal.value) and not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap works on an ordinary reader"


@pytest.mark.parametrize("module,name", [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("dnnlib.tflib.network", "Network"),
                                         ("collections", "OrderedDict.__init__"), ("numpy", "load"), ("torch_utils.persistence", "import_hook")])
def test_a_name_off_the_list_is_said(tmp_path, module, name):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93.")
    with pytest.raises(DataRefused, match=f"{module}.{name}"):
        load_nvlabs(tmp_path / "x.pkl")


def test_damaged_and_missing_files_are_refused(nvlabs, tmp_path):
    whole = nvlabs(*pair()).read_bytes()
    for data in (b"", b"hello", whole[:100], whole[:-1], whole[: len(whole) // 2]):
        (tmp_path / "bad.pkl").write_bytes(data)
        for load in (load_nvlabs, load_rosinality):
            with pytest.raises(DataRefused):
                load(tmp_path / "bad.pkl")
    for load in (load_nvlabs, load_rosinality, load_generator):
        with pytest.raises(DataMissing, match="absent"):
            load(tmp_path / "absent.pkl")


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    g, _ = pair()
    state = dict(g.state_dict())
    for change in ({"synthesis.b16.conv0.weight": torch.zeros(2, 2, 3, 3)}, {"more": torch.zeros(1)}, {"mapping.fc1.bias": torch.full([7], math.inf)}):
        save_weights(tmp_path / "g.safetensors", state | change)
        with pytest.raises(DataRefused):
            load_generator(tmp_path / "g.safetensors")
