"""Power against simulated studies, ensembles by hand, Student's interval, and a distance on the classifier's own features."""
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dermgan import beyond
from dermgan.allot import standardise
from dermgan.classify import build
from dermgan.core import CLASSES, published, resolve_run
from dermgan.evidence import Cell, Study, side
from dermgan.store import Images, pack_images

SHARES = np.array(beyond.TEST_COUNTS) / sum(beyond.TEST_COUNTS)


# --- power ---

def test_the_official_test_set_is_counted_right():
    assert sum(beyond.TEST_COUNTS) == published()["dataset"]["test"] == 1512 and len(beyond.TEST_COUNTS) == len(CLASSES)


def test_a_study_of_the_size_asked_for_finds_the_gain_in_80_of_100():
    both, only = np.full(7, 0.10), np.full(7, 0.06)
    change, gain = both + only - (both - only) ** 2, 0.04
    n = float(beyond.images_needed(gain, change, SHARES))
    counts, draw, found = np.round(SHARES * n).astype(int), np.random.default_rng(0), 0
    for _ in range(1500):
        moves = [draw.multinomial(m, [0.10, 0.06, 0.84]) for m in counts]
        recall = np.array([(plus - minus) / m for (plus, minus, _), m in zip(moves, counts)])
        error = np.sqrt(np.sum([((plus + minus) / m - r * r) / m for (plus, minus, _), m, r in zip(moves, counts, recall)])) / 7
        found += abs(recall.mean()) / error > 1.96
    assert abs(found / 1500 - 0.8) < 0.04
    assert beyond.smallest_gain(n, change, SHARES) == pytest.approx(gain)


def test_half_the_gain_needs_four_times_the_images_and_rare_classes_decide():
    v = np.full(7, 0.2)
    assert beyond.images_needed(0.01, v, SHARES) == pytest.approx(4 * beyond.images_needed(0.02, v, SHARES))
    assert beyond.images_needed(0.02, v, SHARES) > 1.5 * beyond.images_needed(0.02, v, np.full(7, 1 / 7))


def test_the_change_of_an_image_is_the_variance_of_its_class():
    labels = np.arange(210) % 7
    draw = np.random.default_rng(0)
    one, two = (np.eye(7)[np.where(draw.random(210) < share, labels, (labels + 1) % 7)] for share in (0.8, 0.6))
    found = beyond.change_of(Cell([one], labels, [], ""), Cell([two], labels, [], ""), np.ones((1, 210)))[0]
    move = (one.argmax(1) == labels).astype(float) - (two.argmax(1) == labels)
    assert np.allclose(found, [move[labels == k].var() for k in range(7)])


def test_every_printed_gain_has_its_rows_and_no_pair_is_no_number():
    alone, paired = beyond.power_table(None, "not trained"), beyond.power_table(np.full((50, 7), 0.1))
    for frame in (alone, paired):
        assert len(frame) == 2 * (15 + 1) and frame.paper.notna().sum() == 30 and frame.value.notna().eq(frame.reason.eq("")).all()
    assert alone[alone.assumption == "paired as in this run"].value.isna().all()
    rows = paired[(paired.architecture == "densenet169") & (paired.set == "6k") & ~paired.filtered].set_index("assumption").value
    assert rows["paired as in this run"] == pytest.approx(float(beyond.images_needed(0.035, np.full(7, 0.1), SHARES)))
    fig, curve = beyond.draw_power(np.full((2, 7), 0.1))
    assert len(fig.axes[0].lines) == 3 and curve.assumption.nunique() == 2


# --- ensembles ---

class Result:
    def __init__(self, p, labels):
        self.probabilities, self.labels, self.lesions = {"test": p}, {"test": labels}, {"test": [f"l{k}" for k in range(len(labels))]}


def study_of(**lines):
    labels = np.arange(140) % 7
    return Study({("net", name, False): [Result(np.random.default_rng([k, len(name)]).dirichlet(np.ones(7), 140), labels) for k in range(n)]
                  for name, n in lines.items()}, {})


def test_an_ensemble_is_the_mean_of_the_probabilities_of_its_members():
    study = study_of(baseline=3, six=2)
    asked = beyond.ensembles_of(study)
    assert {name: len(members) for name, members in asked.items()} == {"3 seeds of net baseline": 3, "2 seeds of net six": 2,
                                                                       "one of each of 2 lines": 2, "all 5 networks": 5}
    cell = beyond.ensemble(study, asked["all 5 networks"], "test")
    every = [p for line in study.cells for p in side(study, line, "test").probabilities]
    assert np.allclose(cell.probabilities[0], np.mean(every, 0)) and len(cell.probabilities) == 1
    assert beyond.ensembles_of(study_of(baseline=1)) == {}


def test_the_leaderboard_keeps_printed_and_own_apart(tmp_path):
    run = resolve_run("smoke", 0, {"bootstrap_n": "60"}, root=tmp_path)
    study = study_of(baseline=2)
    frame = beyond.ensemble_table(run, study, ("test",))
    printed = frame[frame.paper.notna()]
    assert printed.set_index("entry").paper.to_dict() == published()["leaderboard"] and printed.value.isna().all()
    assert printed.kind.tolist() == ["printed, ensemble", "printed, ensemble", "printed, single network", "printed, single network"]
    ours = frame[frame.value.notna()].set_index("kind")
    labels, cells = np.arange(140) % 7, study.cells["net", "baseline", False]
    single = np.mean([balanced_accuracy_score(labels, c.probabilities["test"].argmax(1)) for c in cells])
    assert ours.value["ours, single network"] == pytest.approx(single, abs=1e-6) and ours.members["ours, ensemble"] == 2
    assert len(beyond.draw_leaderboard(frame, "test").axes[0].get_yticklabels()) == 6


# --- generators ---

def test_generators_lie_side_by_side_or_it_is_said_that_there_is_one(tmp_path):
    run = resolve_run("smoke", 0, {}, root=tmp_path)
    assert len(beyond.sibling_gains(run)) == 0 and beyond.generator_table(beyond.sibling_gains(run)).value.isna().all()
    gains = {"0": 0.02, "1": 0.05, "2": -0.01}
    for seed, gain in gains.items():
        folder = run.folder.with_name(run.folder.name.rsplit("-s", 1)[0] + f"-s{seed}") / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"architecture": "net", "filtered": False, "set": "6k", "eval": "test", "metric": ["balanced accuracy", "AUC"],
                      "value": [gain, 9.0]}).to_csv(folder / "table_differences.csv", index=False)
    other = resolve_run("smoke", 0, {"cls_epochs": "5"}, root=tmp_path)
    row = beyond.generator_table(beyond.sibling_gains(run)).iloc[0]
    expected = stats.t.interval(0.95, 2, loc=0.02, scale=stats.sem(list(gains.values())))
    assert (row.value, row.n) == (pytest.approx(0.02), 3) and (row.low, row.high) == pytest.approx(expected)
    assert len(beyond.sibling_gains(other)) == 0


# --- LPIPS-derm ---

def test_the_distance_is_that_of_unit_vectors_at_five_layers():
    net = build("densenet_small", 7, seed=3).eval().double()
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.rand(3, 3, 64, 64, generator=draw, dtype=torch.float64) * 2 - 1 for _ in range(2))
    kept = {}
    for name in ("relu0", "denseblock1", "denseblock2", "denseblock3", "norm5"):
        getattr(net.features, name).register_forward_hook(lambda _, __, out, name=name: kept.setdefault(name, []).append(out.detach().clone()))
    with torch.no_grad():
        net(standardise(x)), net(standardise(y))
        layers = {name: pair[:2] for name, pair in kept.items()}
        found = beyond.derm_distance(beyond.derm_taps(net, x), beyond.derm_taps(net, y))
    slow = np.zeros(3)
    for pair in layers.values():
        a, b = (v.clamp(min=0).numpy() for v in pair)
        for n in range(3):
            for i, j in np.ndindex(a.shape[2:]):
                u, v = a[n, :, i, j], b[n, :, i, j]
                u, v = (w / np.sqrt((w**2).sum() + 1e-20) for w in (u, v))
                slow[n] += ((u - v) ** 2).sum() / (a.shape[2] * a.shape[3]) / 5
    assert np.allclose(found.numpy(), slow, atol=1e-10) and (0 < slow).all() and (slow <= 2).all()


def test_pairs_share_their_first_photograph_and_their_diagnosis(tmp_path):
    lesions = [f"l{k // 2}" for k in range(28)] + [f"x{k}" for k in range(14)]
    labels = [k // 2 % 7 for k in range(28)] + [k % 7 for k in range(14)]
    pack_images(tmp_path / "h", [np.zeros((16, 16, 3), np.uint8)] * 42, [f"i{k}" for k in range(42)], labels, lesions, CLASSES, 16)
    images = Images(tmp_path / "h")
    frame = beyond.draw_pairs(images, 0)
    assert len(frame) == 28 and frame.same.tolist() == [True, False] * 14
    of = lambda column: np.array(images.lesion_ids)[frame[column]]
    assert (of("first") == frame.lesion).all() and ((of("second") == frame.lesion) == frame.same).all()
    assert (images.labels[frame["first"].tolist()] == images.labels[frame["second"].tolist()]).all()
    assert beyond.draw_pairs(images, 0).equals(frame) and len(beyond.draw_pairs(images, 1, most=3)) == 6


def test_knowing_a_lesion_again_is_an_area_and_its_interval_is_over_lesions():
    draw = np.random.default_rng(0)
    same, lesions = np.arange(80) % 2 == 0, [f"l{k // 2}" for k in range(80)]
    apart = draw.normal(size=80) - same
    value, low, high = beyond.knows_again(apart, same, lesions, 400, 0)
    assert value == pytest.approx(roc_auc_score(same, -apart)) and low < value < high
    assert beyond.knows_again(-same.astype(float), same, lesions, 50, 0) == (1.0, 1.0, 1.0)
