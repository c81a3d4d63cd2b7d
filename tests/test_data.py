"Records, the split, leaks, exclusions, and the way from a data folder to the stores of a run."
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dermgan import data
from dermgan.core import CLASSES, DataMissing, DataNotReady, DataRefused, Run, read_profile, resource
from dermgan.store import Images, pack_images

REAL = Path(os.environ["DERMGAN_DATA"]) if os.environ.get("DERMGAN_DATA") else None
real = pytest.mark.skipif(REAL is None, reason="needs the real images: set DERMGAN_DATA")
COUNTS = {"images": (1113, 6705, 514, 327, 1099, 115, 142), "lesions": (614, 5403, 327, 228, 727, 73, 98),
          "test": (171, 909, 93, 43, 217, 44, 35)}


def a_run(tmp_path, **changes):
    return Run(replace(read_profile("ham"), image_px=16, **changes), 0, tmp_path / "run", tmp_path / "data", None, None)


def toy_records(n=400, seed=0):
    draw = np.random.default_rng(seed)
    sizes = draw.choice([1, 2, 3, 5], n, p=[0.6, 0.2, 0.15, 0.05])
    labels = draw.choice(["a", "b", "c"], n, p=[0.8, 0.15, 0.05])
    rows = [(f"i{k}-{j}", f"L{k}", labels[k]) for k in range(n) for j in range(sizes[k])]
    return pd.DataFrame(rows, columns=["image_id", "lesion_id", "label"])


def save_pictures(folder, names, px=20):
    draw = np.random.default_rng(7)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (px, px + 6, 3), dtype=np.uint8)).save(path)


# the committed split

def test_the_committed_split_is_this_file():
    digest = hashlib.sha256(resource("splits.csv").read_bytes()).hexdigest()
    assert digest == "d85bcb45b6117b884b73d15258611e2bcb2b1547ee8178e5ecb33fba9193fe0d"


def test_a_changed_split_file_is_refused(tmp_path):
    text = resource("splits.csv").read_text()
    for changed in (text.replace(",train", ",holdout", 1), text + "\n", text.rsplit("\n", 2)[0]):
        (tmp_path / "splits.csv").write_text(changed)
        with pytest.raises(DataRefused, match="not the committed split") as refusal:
            data.load_splits(tmp_path / "splits.csv")
        assert len(str(refusal.value).splitlines()) == 3
    (tmp_path / "splits.csv").write_text(text)
    assert len(data.load_splits(tmp_path / "splits.csv")) == 10015


def test_no_lesion_of_the_committed_split_stands_in_two_parts():
    splits = data.load_splits()
    assert list(splits) == ["image_id", "lesion_id", "split"] and splits.image_id.is_unique
    assert (splits.groupby("lesion_id").split.nunique() == 1).all()
    lesions = splits.drop_duplicates("lesion_id").split.value_counts(normalize=True)
    assert abs(lesions["train"] - 0.7) < 0.005 and abs(lesions["val"] - 0.1) < 0.005 and abs(lesions["holdout"] - 0.2) < 0.005
    assert (data.check_leakage(splits).leaked == 0).all()


def test_a_random_split_of_images_is_detected():
    splits = data.load_splits()
    shuffled = splits.assign(split=np.random.default_rng(3).permutation(splits.split))
    with pytest.raises(DataRefused, match="3[0-9]%"):
        data.check_leakage(shuffled)
    assert (data.leakage(shuffled).share >= 0.3).all()


def test_one_planted_lesion_is_found_also_in_the_test_set():
    splits = data.load_splits()
    train = splits[splits.split == "train"].iloc[:1]
    for planted in (train.assign(image_id="new", split="val"), train.assign(lesion_id="new", split="test")):
        frame = data.leakage(pd.concat([splits, planted])).set_index("split")
        assert frame.leaked.sum() == 1 and frame.leaked[planted.split.iloc[0]] == 1
        with pytest.raises(DataRefused, match="1 of"):
            data.check_leakage(pd.concat([splits, planted]))


@pytest.mark.parametrize("seed", range(3))
def test_a_split_keeps_lesions_whole_and_classes_even(seed):
    records = toy_records(seed=seed)
    split = data.split_by_lesion(records, seed)
    assert split.image_id.tolist() == sorted(records.image_id) and (split.groupby("lesion_id").split.nunique() == 1).all()
    lesions = records.drop_duplicates("lesion_id").merge(split.drop_duplicates("lesion_id")[["lesion_id", "split"]])
    for label, group in lesions.groupby("label"):
        counts = group.split.value_counts()
        assert counts["holdout"] == round(0.2 * len(group)) and counts["val"] == max(1, round(0.1 * len(group)))
    assert split.equals(data.split_by_lesion(records.sample(frac=1, random_state=1), seed))
    assert not split.equals(data.split_by_lesion(records, seed + 1))


def test_every_class_of_three_lesions_reaches_every_part():
    records = pd.DataFrame({"image_id": list("abcdefg"), "lesion_id": list("abcdefg"), "label": list("xxxyyyz")})
    split = data.split_by_lesion(records).merge(records[["image_id", "label"]])
    assert (split[split.label != "z"].groupby("label").split.nunique() == 3).all() and set(split.split[split.label == "z"]) == {"train"}


def test_synthetic_images_come_from_train_lesions():
    splits = data.load_splits()
    train = splits[splits.split == "train"].head(20)
    assert data.check_sources(train, splits) == 20
    for bad in (splits[splits.split == "holdout"].head(1), train.head(1).assign(lesion_id=None)):
        with pytest.raises(DataRefused, match="1 of 21"):
            data.check_sources(pd.concat([train, bad]), splits)


# records

def test_both_layouts_of_ham10000_give_the_same_records(tmp_path):
    rows = [(f"ISIC_{i:07}", f"HAM_{i // 2:07}", CLASSES[i % 7]) for i in range(14)]
    dataverse, challenge = tmp_path / "dataverse", tmp_path / "challenge"
    save_pictures(dataverse / "HAM10000_images_part_1", [f"{r[0]}.jpg" for r in rows[:7]])
    save_pictures(dataverse / "HAM10000_images_part_2", [f"{r[0]}.jpg" for r in rows[7:]])
    frame = pd.DataFrame(rows, columns=["image_id", "lesion_id", "dx"])
    frame.assign(dx=frame.dx.str.lower(), dx_type="histo", age=50).to_csv(dataverse / "HAM10000_metadata.csv", index=False)
    save_pictures(challenge / "ISIC2018_Task3_Training_Input", [f"{r[0]}.jpg" for r in rows])
    truth = pd.DataFrame({"image": frame.image_id} | {c: (frame.dx == c).astype(float) for c in CLASSES})
    (challenge / "truth").mkdir()
    truth.to_csv(challenge / "truth" / "ISIC2018_Task3_Training_GroundTruth.csv", index=False)
    frame.rename(columns={"image_id": "image"}).assign(diagnosis_confirm_type="histo")[["image", "lesion_id", "diagnosis_confirm_type"]] \
        .to_csv(challenge / "ISIC2018_Task3_Training_LesionGroupings.csv", index=False)
    one, two = data.ham10000_records(dataverse), data.ham10000_records(challenge)
    shared = ["image_id", "lesion_id", "label", "dx_type"]
    assert one[shared].equals(two[shared]) and one.label.tolist() == [r[2] for r in rows] and all(p.is_file() for p in two.path)
    (challenge / "ISIC2018_Task3_Training_Input" / "ISIC_0000003.jpg").unlink()
    with pytest.raises(DataMissing, match="1 of 14 images"):
        data.ham10000_records(challenge)
    with pytest.raises(DataMissing, match="dermgan fetch ham10000"):
        data.ham10000_records(tmp_path / "empty")
    with pytest.raises(DataMissing, match="dermgan fetch isic2018_test"):
        data.isic2018_test_records(tmp_path / "empty")


@real
def test_real_counts_are_the_published_ones():
    ham, test = data.ham10000_records(REAL), data.isic2018_test_records(REAL)
    assert tuple(ham.label.value_counts()[list(CLASSES)]) == COUNTS["images"]
    assert tuple(ham.groupby("label").lesion_id.nunique()[list(CLASSES)]) == COUNTS["lesions"]
    assert tuple(test.label.value_counts()[list(CLASSES)]) == COUNTS["test"]


@real
def test_the_committed_split_is_the_draw_of_seed_zero_and_even_in_classes():
    ham, splits = data.ham10000_records(REAL), data.load_splits()
    assert data.split_by_lesion(ham, 0).values.tolist() == splits.values.tolist()
    shares = splits.merge(ham[["image_id", "label"]]).groupby("split").label.value_counts(normalize=True).unstack(0)
    assert abs(shares["train"] - shares["val"]).max() < 0.01 and abs(shares["train"] - shares["holdout"]).max() < 0.01


def test_a_folder_a_class_and_a_table_are_read(tmp_path):
    save_pictures(tmp_path, ["acne/a.png", "acne/b.jpg", "rosacea/deep/a.png"])
    (tmp_path / "rosacea" / "notes.txt").write_text("no picture")
    records = data.folder_records(tmp_path)
    assert records.image_id.tolist() == ["acne/a.png", "acne/b.jpg", "rosacea/deep/a.png"]
    assert records.label.tolist() == ["acne", "acne", "rosacea"] and records.lesion_id.equals(records.image_id)
    table = tmp_path / "mine.csv"
    table.write_text("filename,Diagnosis,patient_id\nacne/a,acne,7\nacne/b.jpg,acne,7\n")
    for given in (tmp_path, table):
        assert data.folder_records(given).lesion_id.tolist() == ["7", "7"]
    table.write_text("filename,kind\nacne/a,acne\n")
    with pytest.raises(DataMissing, match="file, label"):
        data.folder_records(table)
    table.write_text("file,label\nacne/zzz,acne\n")
    with pytest.raises(DataMissing, match="1 of 1"):
        data.folder_records(table)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataMissing, match="folder per class"):
        data.folder_records(tmp_path / "none")


# runs

def test_a_folder_of_ones_own_becomes_stores(tmp_path):
    save_pictures(tmp_path / "data", [f"{c}/{i}.png" for c in ("acne", "rosacea") for i in range(10)])
    (tmp_path / "data" / "acne" / "broken.png").write_bytes(b"no picture")
    run = a_run(tmp_path, dataset="folder")
    stores = data.pack_data(run)
    assert set(stores) == {"train", "val", "holdout"} and sum(map(len, stores.values())) == 20
    assert stores["train"].classes == ("acne", "rosacea") and stores["train"].image_px == 16
    assert "acne/broken.png" in (run.folder / "tables" / "rejected.csv").read_text()
    assert len(data.open_images(run, "all")) == 20 and data.evaluation_splits(run) == ("holdout",)
    counts = data.dataset_table(run).set_index(["set", "class"])
    assert counts.value["all", "total"] == 20 and counts.n["all", "acne"] == 10
    with pytest.raises(DataNotReady, match="reproduce.sh"):
        data.open_images(run, "test")


def fake_ham(monkeypatch, tmp_path, n, broken):
    save_pictures(tmp_path / "data", [f"H{i}.jpg" for i in range(n)])
    for i in range(broken):
        (tmp_path / "data" / f"H{i}.jpg").write_bytes(b"\xff\xd8\xff no picture")
    paths = [tmp_path / "data" / f"H{i}.jpg" for i in range(n)]
    records = pd.DataFrame({"image_id": [p.stem for p in paths], "lesion_id": [p.stem for p in paths], "label": "NV", "path": paths})
    monkeypatch.setattr(data, "ham10000_records", lambda folder: records)
    monkeypatch.setattr(data, "isic2018_test_records", lambda folder: records.head(2).assign(image_id=["T0", "T1"], lesion_id=["T0", "T1"],
                                                                                             path=paths[-2:]))
    monkeypatch.setattr(data, "load_splits", lambda: data.split_by_lesion(records))
    return records


def test_ten_rejected_images_are_listed_and_eleven_stop_the_run(monkeypatch, tmp_path):
    fake_ham(monkeypatch, tmp_path, 40, 10)
    run = a_run(tmp_path)
    assert sum(len(s) for s in data.pack_data(run).values()) == 32
    rejected = pd.read_csv(run.folder / "tables" / "rejected.csv")
    assert len(rejected) == 10 and rejected.reason.str.len().min() > 5
    fake_ham(monkeypatch, tmp_path, 40, 11)
    with pytest.raises(DataRefused, match="11 images were rejected"):
        data.pack_data(replace(run, folder=tmp_path / "other"))


def test_a_stranger_among_the_images_and_missing_data_are_named(monkeypatch, tmp_path):
    records = fake_ham(monkeypatch, tmp_path, 12, 0)
    split = data.split_by_lesion(records)
    monkeypatch.setattr(data, "load_splits", lambda: split.iloc[1:])
    with pytest.raises(DataRefused, match="not the images of HAM10000"):
        data.read_records(a_run(tmp_path))
    with pytest.raises(DataMissing, match="--data"):
        data.read_records(replace(a_run(tmp_path), data=None))


def test_a_run_whose_gan_saw_everything_is_not_judged_on_the_hold_out(tmp_path):
    for split in ("holdout", "val", "train"):
        with pytest.raises(DataRefused, match="gan_split = all"):
            data.check_evaluation(a_run(tmp_path, gan_split="all"), split)
    assert data.check_evaluation(a_run(tmp_path, gan_split="all"), "test") == "test"
    assert data.check_evaluation(a_run(tmp_path), "holdout") == "holdout"
    with pytest.raises(DataRefused, match="holdout, test"):
        data.check_evaluation(a_run(tmp_path), "train")
    with pytest.raises(DataRefused):
        data.check_evaluation(a_run(tmp_path, dataset="folder"), "test")
    assert read_profile("paper").gan_split == "all"


def test_the_papers_additions_pass_its_filters_first(monkeypatch, tmp_path):
    fake_ham(monkeypatch, tmp_path, 12, 0)
    top = tmp_path / "data" / "fitzpatrick17k"
    save_pictures(top / "images", [f"f{i}.jpg" for i in range(8)], px=140)
    for i in range(6):
        plain = np.random.default_rng(i).normal(0, 4, (140, 140, 3)) + (205, 150, 125)
        plain[40 + 5 * i:80, 30:60 + 8 * i] = 110, 60, 40
        if i == 5:
            plain[:8, 20:120] = 90, 40, 140
        Image.fromarray(plain.clip(0, 255).astype(np.uint8)).save(top / "images" / f"f{i}.jpg", quality=95)
    Image.open(top / "images" / "f1.jpg").transpose(Image.Transpose.ROTATE_90).save(top / "images" / "f4.jpg", quality=95)
    kinds = ["malignant", "benign", "non-neoplastic", "benign", "benign", "benign", "benign", "benign"]
    pd.DataFrame({"md5hash": [f"f{i}" for i in range(9)], "label": "x", "three_partition_label": [*kinds, "benign"],
                  "qc": [None, None, None, "3 Wrongly labelled", *[None] * 5]}).to_csv(top / "fitzpatrick17k.csv", index=False)
    run = a_run(tmp_path, gan_split="all")
    extra = data.extra_records(run)
    removed = pd.read_csv(run.folder / "tables" / "excluded.csv").set_index("image_id").reason
    assert removed["f2"] == removed["f3"] == "outside the lesion domain" and removed["f4"] == "augmented copy" and removed["f5"] == "demarcated"
    assert {"f0", "f1"} <= set(extra.image_id) and set(extra.image_id) | set(removed.index) == {f"f{i}" for i in range(8)}
    data.pack_data(run)
    together = data.open_images(run, "all")
    assert len(together) == 12 + len(extra) and int((together.labels == -1).sum()) == len(extra) and together.classes == CLASSES
    counts = data.dataset_table(run).set_index(["set", "class"]).value
    assert counts["all", "total"] == 12 and counts["extra", "other"] == len(extra)


# pictures that stand twice, pictures that are marked

def plain_hash(picture):
    "The definition, slowly, in float64: antialiased to 32 px, cosine sums, signs about the median."
    grey = (picture.double() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(0)
    small = grey.reshape(32, grey.shape[0] // 32, 32, -1).mean((1, 3)).numpy()
    at = np.arange(32) + 0.5
    waves = np.array([[(small * np.outer(np.cos(np.pi * u * at / 32), np.cos(np.pi * v * at / 32))).sum() for v in range(1, 9)] for u in range(1, 9)])
    return int("".join("1" if w > np.median(waves) else "0" for w in waves.ravel()), 2)


def test_the_hash_is_its_definition():
    coarse = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = (torch.nn.functional.interpolate(coarse, size=(128, 128), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    ours = [int.from_bytes(int(h).to_bytes(8, "little"), "big") for h in data.perceptual_hash(pictures)]
    assert max((a ^ plain_hash(p)).bit_count() for a, p in zip(ours, pictures)) <= 2


def test_twins_are_listed_across_and_within_stores(tmp_path):
    coarse = torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    scenes = (torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    scenes[7] = (scenes[2].float() * 0.95 + 4).to(torch.uint8)
    pack = lambda name, some: Images(pack_images(tmp_path / name, scenes[some].permute(0, 2, 3, 1).numpy(), [f"{name}{i}" for i in some],
                                                 [0] * len(some), [f"L{i}" for i in some], ("x",), 32))
    gan, test = pack("g", [0, 1, 2, 3]), pack("t", [5, 6, 7, 8])
    found = data.near_duplicates(gan, test)
    assert found[["image_id", "twin"]].values.tolist() == [["g2", "t7"]] and found.difference[0] < 8
    both = pack("b", list(range(12)))
    assert data.near_duplicates(both, both)[["image_id", "twin"]].values.tolist() == [["b2", "b7"]]


@real
def test_the_training_side_has_no_twin_in_the_test_set(tmp_path):
    ham, test = data.ham10000_records(REAL), data.isic2018_test_records(REAL)
    assert not set(ham.image_id) & set(test.image_id)
    hashes = [data.perceptual_hash(data.thumbnails(records.path, 32)[0]) for records in (ham, test)]
    near = np.argwhere(np.bitwise_count(hashes[0][:, None] ^ hashes[1][None]) <= 4)
    assert len(near) < 40
    for i, j in near:
        pair, _ = data.thumbnails([ham.path[i], test.path[j]], 64)
        assert (pair[0].float() - pair[1].float()).abs().mean() > 8, (ham.image_id[i], test.image_id[j])


@real
def test_demarcation_is_found_as_often_as_the_notebook_says():
    truth = pd.read_csv(data.find_one(REAL, "isic_bias.csv"), sep=";").iloc[::2]
    folder = data.find_one(REAL, "isic_bias.csv").parent / "images"
    pictures, _ = data.thumbnails([folder / f"{Path(n).stem}.jpg" for n in truth.image])
    found, unmarked = data.demarcated(pictures), ((truth.ink + truth.patches) == 0).to_numpy()
    assert found[truth.patches.eq(1)].mean() > 0.5 and found[truth.ink.eq(1)].mean() > 0.2 and found[unmarked].mean() < 0.06


def test_exclusions_name_the_first_reason_and_keep_the_order():
    records = pd.DataFrame({"image_id": list("abcd")})
    kept, removed = data.exclude(records, {"one": np.array([0, 1, 0, 0], bool), "two": np.array([0, 1, 1, 0], bool)})
    assert kept.image_id.tolist() == ["a", "d"] and removed.values.tolist() == [["b", "one"], ["c", "two"]]
    assert not data.outside_lesion_domain(records).any()
