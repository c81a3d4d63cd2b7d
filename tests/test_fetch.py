"Outside files: evil archives stay inside, wrong bytes are refused, a broken download goes on."
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import zipfile

import pytest
import yaml

from dermgan.core import DataMissing, DataRefused, import_torchvision
from dermgan.fetch import download, fetch, manifest_table, read_manifest, unpack

RIGHT = bytes(range(256)) * 400


class Publisher(http.server.BaseHTTPRequestHandler):
    "Serves one file; can break off, ignore ranges, or send something else."

    def log_message(self, *words):
        pass

    def do_GET(self):
        plan = self.server.plan
        plan["asked"].append(self.headers.get("Range"))
        body, start = plan["body"], 0
        same = self.headers.get("If-Range") == f'"{hashlib.md5(body).hexdigest()}"'
        if self.headers.get("Range") and same and plan["ranges"]:
            start = int(self.headers["Range"].split("=")[1].rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        self.end_headers()
        end = start + plan["break_after"] if plan["break_after"] and len(plan["asked"]) <= plan["breaks"] else len(body)
        self.wfile.write(body[start:end])


@pytest.fixture
def site(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher)
    server.plan = {"body": RIGHT, "asked": [], "ranges": True, "break_after": 0, "breaks": 0}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = {"name": "set.bin", "url": f"http://127.0.0.1:{server.server_port}/set.bin", "bytes": len(RIGHT),
            "sha256": hashlib.sha256(RIGHT).hexdigest(), "max_bytes": 200_000}
    entry = {"title": "Set", "kind": "data", "into": "set", "licence": "CC0", "licence_url": "https://example.org", "home": "", "files": [file]}

    def get(accept=True, **changes):
        path = tmp_path / "manifest.yaml"
        path.write_text(yaml.safe_dump({"set": {**entry, "files": [file | changes]}}))
        return fetch("set", accept, tmp_path / "data", path)
    yield server.plan, get, tmp_path / "data" / "set"
    server.shutdown()
    server.server_close()


def tar_of(*members, mode="w"):
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode=mode) as opened:
        for name, kind, link, size in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, size
            opened.addfile(member, io.BytesIO(bytes(size)) if size else None)
    return buffer.getvalue()


def zip_of(*members, attributes=0):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as opened:
        for name, size in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = attributes, zipfile.ZIP_DEFLATED
            opened.writestr(info, bytes(size))
    return buffer.getvalue()


EVIL = {
    "parent.tar": lambda: tar_of(("../outside", tarfile.REGTYPE, "", 3)),
    "absolute.tar": lambda: tar_of(("/tmp/dermgan-outside", tarfile.REGTYPE, "", 3)),
    "symlink.tar": lambda: tar_of(("in", tarfile.SYMTYPE, "..", 0), ("in/outside", tarfile.REGTYPE, "", 3)),
    "hardlink.tar": lambda: tar_of(("in", tarfile.LNKTYPE, "../secret", 0)),
    "device.tar": lambda: tar_of(("null", tarfile.CHRTYPE, "", 0)),
    "fifo.tar": lambda: tar_of(("pipe", tarfile.FIFOTYPE, "", 0)),
    "bomb.tar.gz": lambda: tar_of(("zeros", tarfile.REGTYPE, "", 50 * 2**20), mode="w:gz"),
    "many.tar": lambda: tar_of(*[(f"{i}", tarfile.REGTYPE, "", 0) for i in range(2000)]),
    "parent.zip": lambda: zip_of(("../outside", 3)),
    "absolute.zip": lambda: zip_of(("/tmp/dermgan-outside", 3)),
    "backslash.zip": lambda: zip_of(("..\\outside", 3)),
    "symlink.zip": lambda: zip_of(("in", 3), attributes=0o120777 << 16),
    "bomb.zip": lambda: zip_of(("zeros", 200 * 2**20)),
    "many.zip": lambda: zip_of(*[(f"{i}", 0) for i in range(100_000)]),
    "second too much.zip": lambda: zip_of(("a", 600_000), ("b", 600_000)),
    "no archive.zip": lambda: b"PK nothing",
    "cut.tar.gz": lambda: tar_of(("a", tarfile.REGTYPE, "", 300_000), mode="w:gz")[:200],
}


@pytest.mark.parametrize("name", EVIL)
def test_an_evil_archive_writes_nothing(tmp_path, name):
    (tmp_path / "secret").write_text("s")
    archive, inside = tmp_path / name, tmp_path / "a" / "inside"
    archive.write_bytes(EVIL[name]())
    with pytest.raises(DataRefused) as refused:
        unpack(archive, inside, max_bytes=10**6, max_members=1000)
    assert len(str(refused.value).splitlines()) == 3
    assert list(inside.rglob("*")) == []
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["a", "inside", "secret", name])
    assert not os.path.exists("/tmp/dermgan-outside")


def test_a_lying_zip_header_is_caught(tmp_path):
    data = bytearray(zip_of(("a", 5_000_000)))
    at = data.rindex(b"PK\x01\x02")
    data[at + 24:at + 28] = (1000).to_bytes(4, "little")
    (tmp_path / "liar.zip").write_bytes(data)
    with pytest.raises(DataRefused):
        unpack(tmp_path / "liar.zip", tmp_path / "in", max_bytes=10**6)
    assert [p for p in (tmp_path / "in").rglob("*") if p.is_file()] == []


def test_a_good_archive_is_unpacked(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of(("d/one", 3), ("two", 0)))
    (tmp_path / "a.tgz").write_bytes(tar_of(("d", tarfile.DIRTYPE, "", 0), ("d/three", tarfile.REGTYPE, "", 5), mode="w:gz"))
    for name in ("a.zip", "a.tgz"):
        unpack(tmp_path / name, tmp_path / "in", max_bytes=8, max_members=2)
    assert sorted(p.relative_to(tmp_path / "in").as_posix() for p in (tmp_path / "in").rglob("*")) == ["d", "d/one", "d/three", "two"]


WRONG = {"flipped bit": RIGHT[:5000] + bytes([RIGHT[5000] ^ 1]) + RIGHT[5001:], "short": RIGHT[:-1], "long": RIGHT + b"x",
         "error page": b"<!DOCTYPE html><html>Not found</html>"}


@pytest.mark.parametrize("known", ["sha256", "prefix"])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_bytes_are_refused_and_kept_apart(site, kind, known):
    plan, get, folder = site
    plan["body"], right = WRONG[kind], hashlib.sha256(RIGHT).hexdigest()
    changes = {} if known == "sha256" else {"bytes": None, "sha256": None, "sha256_prefix": right[:8]}
    with pytest.raises(DataRefused) as refused:
        get(**changes)
    assert (folder / "set.bin.bad").exists() and not (folder / "set.bin").exists() and not (folder / "set.bin.part").exists()
    if not (kind == "long" and known == "sha256"):
        assert right[:8] in str(refused.value) and hashlib.sha256(WRONG[kind]).hexdigest() in str(refused.value)
    plan["body"] = RIGHT
    assert get(**changes)[0].read_bytes() == RIGHT


def test_an_unverified_error_page_is_refused_too(site):
    plan, get, folder = site
    plan["body"] = WRONG["error page"]
    with pytest.raises(DataRefused, match="HTML"):
        get(bytes=None, sha256=None)
    assert not (folder.parent.parent / "data_manifest.lock").exists()


def test_the_first_fetch_locks_the_hash(site):
    plan, get, folder = site
    get(bytes=None, sha256=None)
    lock = json.loads((folder.parent.parent / "data_manifest.lock").read_text())
    assert lock == {"set/set.bin": {"bytes": len(RIGHT), "sha256": hashlib.sha256(RIGHT).hexdigest()}}
    (folder / "set.bin").unlink()
    plan["body"] = WRONG["flipped bit"]
    with pytest.raises(DataRefused):
        get(bytes=None, sha256=None)
    (folder / "set.bin").write_bytes(WRONG["flipped bit"])
    with pytest.raises(DataRefused):
        get(bytes=None, sha256=None)
    assert not (folder / "set.bin").exists()


def test_a_broken_download_goes_on_and_a_whole_one_is_not_fetched_again(site):
    plan, get, folder = site
    plan |= {"break_after": 30_000, "breaks": 2}
    assert get()[0].read_bytes() == RIGHT
    assert plan["asked"] == [None, "bytes=30000-", "bytes=60000-"]
    get()
    assert len(plan["asked"]) == 3


def test_a_server_that_ignores_ranges_or_changes_its_file_starts_again(site):
    plan, get, folder = site
    plan |= {"break_after": 30_000, "breaks": 1, "ranges": False}
    assert get()[0].read_bytes() == RIGHT
    (folder / "set.bin").rename(folder / "set.bin.part")
    (folder / "set.bin.part.etag").write_text('"an older file"')
    plan["ranges"] = True
    assert get()[0].read_bytes() == RIGHT


def test_a_download_stops_at_its_bound_and_a_dead_server_is_named(site, tmp_path):
    plan, get, folder = site
    with pytest.raises(DataRefused, match="too long"):
        get(bytes=None, sha256=None, max_bytes=1000)
    assert (folder / "set.bin.bad").stat().st_size <= 1000
    with pytest.raises(DataMissing, match="same command again"):
        download("http://127.0.0.1:9/x", tmp_path / "x.part", 10, tries=1, wait_s=1)
    with pytest.raises(DataRefused, match="web address"):
        download("file:///etc/passwd", tmp_path / "x.part", 10**6)


def test_licence_exclusion_and_manual_steps_are_said(site, tmp_path):
    plan, get, folder = site
    with pytest.raises(DataRefused, match="--accept-licence"):
        get(accept=False)
    with pytest.raises(DataRefused, match="demarcations"):
        fetch("ddi", True, tmp_path)
    with pytest.raises(DataMissing, match="form"):
        fetch("seven_point", True, tmp_path)
    with pytest.raises(DataMissing, match="ham10000"):
        fetch("ham1000", True, tmp_path)
    assert plan["asked"] == []


def test_the_manifest_is_whole():
    manifest = read_manifest()
    assert len(manifest_table()) == len(manifest) >= 12
    for entry in manifest.values():
        assert {"title", "kind", "into", "holds", "licence", "licence_url", "home", "citation", "needed_by", "files"} <= entry.keys()
        assert entry["files"] or entry.get("manual") or entry.get("excluded")
        for file in entry["files"]:
            assert {"name", "url", "bytes", "sha256", "max_bytes"} <= file.keys() and file["url"].startswith("https://")
            assert file["name"].endswith(".zip") == ("unpack" in file)
            if file.get("sha256_prefix"):
                assert f"-{file['sha256_prefix']}." in file["name"]


def test_weights_have_torchvisions_own_addresses():
    models = import_torchvision().models
    own = {"alexnet": models.AlexNet_Weights, "squeezenet": models.SqueezeNet1_1_Weights, "densenet121": models.DenseNet121_Weights,
           "densenet169": models.DenseNet169_Weights, "resnet34": models.ResNet34_Weights}
    for name, weights in own.items():
        file, weights = read_manifest()[name]["files"][0], weights.IMAGENET1K_V1
        assert file["url"] == weights.url
        assert weights.meta["_file_size"] * 2**20 < file["max_bytes"] < 2 * weights.meta["_file_size"] * 2**20
