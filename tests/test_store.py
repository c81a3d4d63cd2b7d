"Outside pictures and image stores: what is refused, what survives being killed, what workers read."
import io
import multiprocessing
import resource
import threading
import time

import numpy as np
import pytest
import torch
import tqdm.auto
from PIL import Image

from dermgan.core import DataNotReady, DataRefused
from dermgan.store import Images, encode_image, open_store, pack_images, read_image, square, store_facts, to_float, to_uint8

PX, N = 32, 300
ABOUT = [f"ISIC_{i:07}" for i in range(N)], [i % 3 for i in range(N)], [f"L{i // 2}" for i in range(N)], ("a", "b", "c"), PX


def pictures(wait_s: float = 0):
    draw = np.random.default_rng(1)
    for _ in range(N):
        time.sleep(wait_s)
        yield draw.integers(0, 256, (PX, PX, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return pack_images(tmp_path_factory.mktemp("store") / "train", pictures(), *ABOUT)


def test_a_pack_killed_ten_times_equals_an_uninterrupted_one(tmp_path, store):
    folder, draw = tmp_path / "train", np.random.default_rng(0)
    for bar in (tqdm.auto.tqdm, tqdm.std.tqdm):
        bar.set_lock(threading.RLock())   # tqdm's own is shared with forked children: one killed while it holds it keeps it for ever
    fork, kept = multiprocessing.get_context("fork"), []
    for _ in range(10):
        child = fork.Process(target=lambda: pack_images(folder, pictures(0.002), *ABOUT))
        child.start()
        time.sleep(draw.uniform(0.05, 0.5))
        child.kill()
        child.join()
        kept.append(store_facts(folder))
        with pytest.raises(DataNotReady, match="reproduce.sh"):
            Images(folder)
    assert not any(kept)
    images = Images(pack_images(folder, pictures(), *ABOUT))
    assert store_facts(folder)["sha256"] == store_facts(store)["sha256"]
    with open_store(str(folder))[0].begin() as transaction:
        assert transaction.stat()["entries"] == len(images) == N
    assert np.array_equal(images.all().permute(0, 2, 3, 1), np.stack(list(pictures())))


def test_a_complete_store_is_left_alone_and_another_request_packs_anew(tmp_path):
    def never():
        raise AssertionError("a complete store reads no picture")
        yield
    folder = pack_images(tmp_path / "s", pictures(), *ABOUT)
    before = (folder / "data.mdb").stat().st_mtime_ns
    assert pack_images(folder, never(), *ABOUT) == folder and (folder / "data.mdb").stat().st_mtime_ns == before
    pack_images(folder, pictures(), *ABOUT, facts="another generator")
    assert store_facts(folder)["count"] == N and Images(folder).ids == ABOUT[0]
    with pytest.raises(DataRefused, match="twice"):
        pack_images(tmp_path / "t", pictures(), ["x"] * N, *ABOUT[1:])


def test_a_large_store_outgrows_its_first_map(tmp_path):
    n, px = 30, 1024
    names = [str(i) for i in range(n)]
    folder = pack_images(tmp_path / "s", (np.full((px, px, 3), i, np.uint8) for i in range(n)), names, [0] * n, names, ("x",), px)
    assert (folder / "data.mdb").stat().st_size > 2**26
    assert [int(Images(folder)[i][0].min()) for i in (0, 29)] == [0, 29]


def test_jpeg_values_decode_to_nearly_the_same(tmp_path):
    smooth = np.stack(np.broadcast_arrays(np.arange(PX)[None] * 6, np.arange(PX)[:, None] * 6, 90), 2).astype(np.uint8)
    images = Images(pack_images(tmp_path / "s", [smooth], ["a"], [0], ["a"], ("x",), PX, store="jpeg"))
    assert np.abs(images[0][0].permute(1, 2, 0).numpy().astype(int) - smooth).max() <= 8
    assert len(encode_image(smooth, "jpeg")) < len(encode_image(smooth, "raw")) / 2


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same_samples_in_the_same_order(store, start):
    images = Images(store)
    images[0]
    alone = [(x.clone(), y.clone()) for x, y in torch.utils.data.DataLoader(images, 50)]
    assert torch.equal(torch.cat([x for x, _ in alone]), images.all())
    for workers in (2, 4):
        loader = torch.utils.data.DataLoader(images, 50, num_workers=workers, multiprocessing_context=start)
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(alone, loader, strict=True))


def test_several_stores_read_as_one(store, tmp_path):
    other = pack_images(tmp_path / "val", pictures(), [f"val {i}" for i in range(N)], *ABOUT[1:])
    both = Images(store, other)
    assert len(both) == 2 * N and both.ids[N] == "val 0" and both.classes == ("a", "b", "c")
    assert torch.equal(both[N + 7][0], Images(other)[7][0]) and both.lesion_ids[:2] == ["L0", "L0"]


def bad_pictures():
    draw = np.random.default_rng(0)
    photo = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    jpeg, png = encoded(photo, "JPEG"), bytearray(encoded(photo))
    png[len(png) // 2] ^= 4
    turned = photo.getexif()
    turned[0x0112] = 6
    return {
        "empty": b"", "text": b"not a picture at all", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "half": jpeg[: len(jpeg) // 2],
        "flipped bit": bytes(png), "gif": encoded(photo, "GIF"), "16000 x 16000": encoded(Image.new("1", (16000, 16000))),
        "10000 x 9600": encoded(Image.new("1", (10000, 9600))), "1 x 1": encoded(Image.new("RGB", (1, 1))),
        "16 bit": encoded(Image.fromarray(np.full((60, 80), 257 * 100, np.uint16))), "cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "rgba": encoded(photo.convert("RGBA")), "turned": encoded(photo, "JPEG", exif=turned),
        "animated": encoded(photo, "WEBP", save_all=True, append_images=[photo] * 3)}


def test_every_bad_picture_is_made_rgb_or_refused_with_a_reason(tmp_path):
    bad = bad_pictures()
    fine = {"16 bit", "cmyk", "rgba", "turned", "animated"}
    for name, data in bad.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)

    def look(pipe):
        before, results = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
        for name in bad:
            try:
                image = read_image(tmp_path / f"{name}.jpg")
                results[name] = (image.mode, image.size)
            except DataRefused as error:
                results[name] = str(error)
        pipe.send((results, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    child = fork.Process(target=look, args=(there,))
    child.start()
    results, grown_mb = here.recv()
    child.join()
    assert grown_mb < 300
    assert {name for name, result in results.items() if isinstance(result, tuple)} == fine
    assert all(len(result.splitlines()) == 3 and result.splitlines()[1] for result in results.values() if isinstance(result, str))
    assert results["turned"] == ("RGB", (60, 80)) and results["cmyk"] == ("RGB", (80, 60))
    assert read_image(bad["16 bit"]).getpixel((3, 3)) == (100, 100, 100)


def test_transparency_is_laid_on_white_and_long_files_are_refused():
    assert read_image(encoded(Image.new("RGBA", (20, 20), (10, 20, 30, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(encoded(Image.new("LA", (20, 20), (10, 255)))).getpixel((0, 0)) == (10, 10, 10)
    with pytest.raises(DataRefused, match="12.0 MB"):
        read_image(bytes(12 * 2**20))


def test_refused_pictures_are_listed_and_the_rest_is_packed(tmp_path):
    def refused():
        return square(read_image(b"GIF89a"), PX)
    folder = pack_images(tmp_path / "s", [refused, *pictures()][:N], *ABOUT)
    assert len(Images(folder)) == N - 1 and store_facts(folder)["rejected"] == 1
    assert (folder / "rejected.csv").read_text().splitlines()[1].startswith("ISIC_0000000,Its format")


def test_the_central_square_is_cut_exactly_and_shrunk_without_moire():
    frame = np.zeros((45, 60, 3), np.uint8)
    frame[:, 7:52] = np.random.default_rng(0).integers(0, 256, (45, 45, 3))
    assert np.array_equal(square(Image.fromarray(frame), 45), frame[:, 7:52])
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    grey = square(Image.fromarray(np.repeat(checks[..., None], 3, 2).astype(np.uint8)), 16)
    assert abs(grey.astype(int) - 127).max() <= 2


def test_bytes_survive_the_way_in_and_out():
    u = torch.arange(256, dtype=torch.uint8)
    x = to_float(u)
    assert (x.min(), x.max(), x.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(x), u) and torch.equal(to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_images_held_are_the_images_read_where_they_fit(tmp_path, kind):
    images = Images(pack_images(tmp_path / "s", pictures(), *ABOUT, store=kind))
    size, read = N * 3 * PX**2, [images.batch([3, 0, N - 1, 3]), images.all()]
    assert not images.hold("cpu") and not images.hold("cpu", size - 1) and images.held is None
    assert images.hold("cpu", size) and torch.equal(images.batch(torch.tensor([3, 0, N - 1, 3])), read[0])
    assert torch.equal(images.all(), read[1]) and images[7][1] == int(images.labels[7])
