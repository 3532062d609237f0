"""report/ and evaluate/example_images.py: pages that stand alone and tell the truth."""
import base64
import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from html_reader import read
from torch import nn

from ensadv_fast import attacks, ops, report
from ensadv_fast.data import Split
from ensadv_fast.evaluate import example_images
from ensadv_fast.report import examples, figures, layouts, markup, style, train_page
from ensadv_fast.report.markup import Number

EVIL = "<script>alert('1')</script> & \"x\""


def document(*blocks):
    return read(markup.document("t", "v", [], [markup.Section("s", blocks)]))


# ------------------------------------------------------------------------------------------------- markup


def test_text_is_escaped_and_markup_is_not():
    made = markup.tag("p", EVIL, None, [markup.tag("b", "x"), "<"], title=EVIL, class_="c", hidden=None, open=False)
    assert made.count("<") == 4 and "<b>x</b>&lt;</p>" in made and "hidden" not in made and "open" not in made
    reader = document(made)
    assert EVIL in reader.text
    assert {"class": "c", "title": EVIL} in reader.all("p")


@pytest.mark.parametrize("value, form, want", [
    (0.1234, ".1%", "12.3"), (1.0, ".1%", "100.0"), (0.5, ".3f", "0.500"), (None, ".1%", "–"), (math.nan, ".1%", "–"),
    (math.inf, ".2f", "–")])
def test_numbers_as_they_are_shown(value, form, want):
    assert markup.show(value, form) == want


def test_the_best_and_what_ties_with_it():
    cells = [Number(0.5), Number(0.2, spread=0.05), Number(0.28, spread=0.04), Number(None), "words",
             Number(0.3, low=0.26, high=0.4)]
    assert [getattr(c, "mark", "-") for c in markup.mark_best(cells)] == ["", "best", "tied", "", "-", ""]
    assert [c.mark for c in markup.mark_best([0.1, 0.3, 0.3], lower=False)] == ["", "best", "best"]
    assert [c.mark for c in markup.mark_best([0.1, None])] == ["", ""]  # one number is not best of anything


# ------------------------------------------------------------------------------------------------- blocks


def test_table():
    cell = {"value": 0.25, "low": 0.2, "high": 0.3, "count": 10, "n": 40}
    reader = document(markup.table(["", "a", "b", "c"], [["row", *markup.mark_best([0.5, cell]), EVIL]],
                                   form=[".2%", ".0%", ".1%"], note="In %."))
    assert reader.tables[0] == [["", "a", "b", "c"], ["row", "50.00", "●2520 to 30", EVIL]]
    assert "In %. ● best of its row." in reader.text.replace("\u00a0", " ")
    with pytest.raises(ValueError):
        markup.table(["", "a"], [["row", 1.0, 2.0]])


def test_a_heatmap_shows_its_numbers_on_colours_in_their_order():
    reader = document(markup.heatmap(["A", EVIL], ["X", "Y", "Z"], [[0.0, 0.5, 1.0], [None, 2.0, Number(0.3, 0.01)]],
                                     own=[[0, 1]]))
    assert reader.tables[0][1:] == [["A", "0.0", "50.0", "100.0"], [EVIL, "–", "200.0", "30.0± 1.0"]]
    classes = [a.get("class") for a in reader.all("td")]
    assert classes == ["h0", "h10 own", "h20", None, "h20", "h6"]
    assert reader.all("td")[3]["title"] == f"{EVIL} → X"


def test_a_checklist_says_its_states_in_words():
    reader = document(markup.checklist([
        {"state": "good", "claim": "a"}, {"state": "bad", "claim": EVIL, "evidence": "e"},
        {"state": "open", "claim": "c"}, {"state": "good", "word": "holds", "claim": ""}]))
    for words in ("✓ passed", "✗ suspicious", "? not decidable", "✓ holds", EVIL):
        assert words in reader.text


def test_configuration_is_listed_flat():
    reader = document(markup.key_values("C", {"a": 1 / 3, "b": {"c": None, "d": True}, "e": ["x", EVIL], "f": []}))
    assert reader.tables[0] == [["a", "0.333333"], ["b.c", "–"], ["b.d", "True"], ["e", f"x {EVIL}"], ["f", "–"]]


def decoded(uri):
    """The pixels of a PNG data URI with unfiltered lines."""
    raw = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(raw):
        length, kind = struct.unpack(">I4s", raw[at:at + 8])
        body = raw[at + 8:at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length:at + 12 + length])[0] == zlib.crc32(kind + body)
        parts[kind], at = body, at + 12 + length
    width, height, depth, colour, *_ = struct.unpack(">2I5B", parts[b"IHDR"])
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, -1)
    assert depth == 8 and list(parts) == [b"IHDR", b"IDAT", b"IEND"] and not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width) if colour == 0 else lines[:, 1:].reshape(height, width, 3)


@pytest.mark.parametrize("shape", [(28, 28), (5, 7, 3), (1, 1)])
def test_png(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(decoded(markup.png(image)), image)


@pytest.mark.parametrize("image", [np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8)])
def test_png_wants_bytes(image):
    with pytest.raises(ValueError, match="png: image must be uint8 .*, got "):
        markup.png(image)


def test_images_have_words_and_small_ones_are_enlarged():
    rows = [markup.ImageRow(EVIL, np.zeros((2, 28, 28), np.uint8), ["3", "4"]),
            markup.ImageRow("large", np.zeros((2, 96, 96, 3), np.uint8), label="shown")]
    reader = document(markup.images(["one", "two"], rows))
    assert [a["alt"] for a in reader.all("img")] == [f"{EVIL}, one", f"{EVIL}, two", "large, one", "large, two"]
    assert reader.tables[0][1:] == [[EVIL, "3", "4"], ["shown", "", ""]]
    assert [a.get("class") for a in reader.all("td")] == [None, None, "large", "large"]
    assert "image-rendering:pixelated" in style.sheet()


# ------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("low, high, want", [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 16, [0, 5, 10, 15]),
                                             (-0.3, 0.3, [-0.2, 0, 0.2]), (3, 3.001, [3, 3.0002, 3.0004, 3.0006,
                                                                                      3.0008, 3.001])])
def test_ticks_are_round(low, high, want):
    assert figures.ticks(low, high) == pytest.approx(want)


def test_curves_go_through_their_points_and_stop_at_gaps():
    line = {"name": EVIL, "x": [0, 1, 2, 3, 4], "y": [0.0, 1.0, None, 0.5, math.nan], "low": [0, 0.9, None, 0.4, None],
            "high": [0, 1, 1, 0.6, 1]}
    reader = document(figures.curves([line, figures.Series("b", [0, 4], [0.25, 0.75], look=5)], title="T",
                                     x_label="x", y_label="y, %", y_range=(0, 1), x_form=".0f"))
    lines = reader.all("polyline")
    # x 0..4 is 50..410, y 0..1 is 228..10
    assert [a["points"] for a in lines] == ["50.0,228.0 140.0,10.0", "320.0,119.0", "50.0,173.5 410.0,64.5"]
    assert [a["class"] for a in lines] == ["line s0", "line s0", "line s5"]
    assert [a["points"] for a in reader.all("polygon")] == [
        "50.0,228.0 140.0,10.0 140.0,31.8 50.0,228.0", "320.0,97.2 320.0,140.8"]
    assert f"{EVIL}: 50.0 at 3" in reader.titles
    assert EVIL in reader.text and "100" in reader.text  # in the legend; the axis counts in percent


@pytest.mark.parametrize("series", [[], [{"name": "a", "x": [], "y": []}], [{"name": "a", "x": [1], "y": [None]}]])
def test_curves_without_a_point_say_so(series):
    assert "Nothing was measured" in document(figures.curves(series, title="", x_label="", y_label="")).text


def test_one_point_and_a_constant_are_drawn():
    for y in ([0.5], [0.5, 0.5]):
        made = figures.curves([{"name": "a", "x": list(range(len(y))), "y": y}], title="", x_label="", y_label="")
        assert "nan" not in made and "polyline" in made


def test_more_curves_than_colours_still_differ_from_their_neighbours():
    many = [{"name": str(i), "x": [0, 1], "y": [0, i]} for i in range(10)]
    looks = [a["class"] for a in document(figures.curves(many, title="", x_label="", y_label="")).all("polyline")]
    assert len(set(looks)) == len(style.SERIES["light"]) == len(figures.DASHES) == len(figures.MARKERS)


# ----------------------------------------------------------------------------------------------- surfaces


def test_contours_of_a_plane_are_its_lines():
    x, y = np.meshgrid(np.arange(6.0), np.arange(5.0))
    segments = figures.contours(2 * x + y, 4.5)
    assert segments and all(2 * px + py == pytest.approx(4.5) for s in segments for px, py in s)
    assert sum(math.dist(*s) for s in segments) == pytest.approx(math.dist((0.25, 4), (2.25, 0)))


def test_contours_of_a_saddle_follow_its_middle_and_gaps_have_none():
    (high_middle, low_middle) = (figures.contours(np.array([[1.0, 0], [0, 1]]), v) for v in (0.4, 0.6))
    assert len(high_middle) == len(low_middle) == 2
    # Where the middle (0.5) is above the line, the lines cut off the two low corners, else the two high ones.
    for segments, corners in ((high_middle, {(1, 0), (0, 1)}), (low_middle, {(0, 0), (1, 1)})):
        assert {tuple(np.round(np.mean(s, axis=0)).astype(int)) for s in segments} == corners
    assert figures.contours(np.array([[1.0, np.nan], [0, 0]]), 0.5) == []


def test_surface():
    n = 30
    x = np.linspace(-1, 1, n)
    values = (x[:, None] ** 2 + x[None] * 3).tolist()
    made = figures.surface(values, x, x, title=EVIL, x_label="g", y_label="h", z_label="loss", form=".2f")
    reader = document(made)
    assert "loss: -3.00" in reader.text and "4.00" in reader.text and len(reader.all("image")) == 1
    assert len(reader.all("polygon")) == 24 * 24  # the relief is thinned out
    image = decoded(reader.all("image")[0]["href"])
    assert tuple(image[0, -1]) == style.rgb(style.SURFACE[-1])  # the highest: x = 1, y = 1, right and at the top
    assert (image[:, 0].sum(axis=1) < image[:, -1].sum(axis=1)).all()
    assert len(made) < 120_000


def test_surfaces_with_gaps_flat_ones_and_wrong_sizes():
    options = {"title": "", "x_label": "", "y_label": "", "z_label": "loss"}
    gap = figures.surface([[0.0, None, 1], [1, 1, 1], [1, 2, 3]], [0, 1, 2], [0, 1, 2], **options)
    assert len(document(gap).all("polygon")) == 2 and "nan" not in gap
    assert len(document(figures.surface([[1, 1], [1, 1]], [0, 1], [0, 1], **options)).all("polygon")) == 1
    assert "Nothing finite" in figures.surface([[None] * 2] * 2, [0, 1], [0, 1], **options)
    with pytest.raises(ValueError, match=r"surface: values must be \[2, 3\], .*got \[2, 2\]"):
        figures.surface([[1, 1], [1, 1]], [0, 1, 2], [0, 1], **options)


# ------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_everything_can_be_read_in_both_modes(mode):
    colours = style.MODES[mode]
    for name in ("text", "quiet", "good", "bad", "open", "link"):
        assert style.contrast(colours[name], colours["page"]) >= 4.5, name
        assert name in ("good", "bad", "open", "link") or style.contrast(colours[name], colours["soft"]) >= 4.5, name
    for colour in style.SERIES[mode]:
        assert style.contrast(colour, colours["page"]) >= 3, colour
    heat = [style.between(style.HEAT[mode], i / style.LEVELS) for i in range(style.LEVELS + 1)]
    assert all(style.contrast(c, style.ink(c)) >= 4.5 for c in heat)
    against = [style.contrast(c, colours["page"]) for c in heat]
    assert against == sorted(against) and against[-1] > 10  # strong means high, without colour vision too


def test_the_colours_of_surfaces_grow_lighter():
    against = [style.contrast(style.between(style.SURFACE, i / 20), "#000000") for i in range(21)]
    assert against == sorted(against)


def test_print_is_light():
    dark = style.sheet().split("@media screen and (prefers-color-scheme:dark)")
    assert len(dark) == 2 and style.MODES["dark"]["page"] not in dark[0]


# ------------------------------------------------------------------------------------------------- samples


def test_samples_come_back_as_they_were_saved(tmp_path):
    assert examples.load(tmp_path / examples.FILE) is None
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8), torch.arange(30) % 12)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 12))
    made = example_images.craft(split, {"fgsm": attacks.fgsm(0.1)}, EVIL, model, {"m": model, EVIL: model},
                                ops.fresh_key("cpu", 0))
    made.save(tmp_path / examples.FILE)
    back = examples.load(tmp_path / examples.FILE)
    assert back.source == EVIL and back.labels.tolist() == list(range(10))
    assert list(back.pictures) == ["clean", "fgsm"] and back.pictures["fgsm"].shape == (10, 8, 8, 3)
    moved = np.abs(back.pictures["fgsm"].astype(int) - back.pictures["clean"])
    assert moved.max() == 26 or moved.max() == 25  # 25.5, rounded
    for row in back.pictures:
        assert list(back.predictions[row]) == ["m", EVIL]
        assert np.array_equal(back.predictions[row]["m"], made.predictions[row]["m"])
    (tmp_path / examples.FILE).write_bytes(b"no")
    with pytest.raises(ValueError, match="samples: .* is corrupt"):
        examples.load(tmp_path / examples.FILE)


def test_large_images_are_fewer_and_thinned_out():
    split = Split(torch.randint(0, 256, (12, 3, 224, 224), dtype=torch.uint8), torch.arange(12))
    made = example_images.craft(split, {}, None, None, {}, ops.fresh_key("cpu", 0))
    assert made.pictures["clean"].shape == (4, 112, 112, 3) and made.source == ""
    assert np.array_equal(made.pictures["clean"][1], split.images[1, :, ::2, ::2].permute(1, 2, 0).numpy())


# -------------------------------------------------------------------------------------------------- report


def results(seeds=2):
    """results.json of a training run with a model and a source that are called EVIL."""
    rng = np.random.default_rng(0)
    names, sources = ["D", "D_adv", "D_ens", EVIL], {"A": "held_out", EVIL: "static"}

    def errors():
        return {"clean": rng.random(), "white_box": {a: rng.random() for a in ("fgsm", "rand_fgsm", "mine")},
                "black_box": {a: {s: rng.random() for s in sources} for a in ("fgsm", "rand_fgsm", "mine")},
                **{k: rng.random() for k in train_page.SUMMARY}}

    def none(tree):
        return {k: none(v) for k, v in tree.items()} if isinstance(tree, dict) else None

    models = {n: {**errors(), "std": errors() if seeds > 1 else none(errors()),
                  "per_seed": {str(s): errors() for s in range(seeds)}} for n in names}
    return {"command": "train", "dataset": EVIL, "eps": 0.3, "sources": sources, "models": models,
            "versions": {"torch": "2", "ensadv_fast": "1"}, "seconds": {"total": 12.0, "train": {"D": 1.0}}}


def metrics(names, seeds=2):
    return [{"job": f"{n}-seed{s}", "step": step, "clean_loss": 1 / step + s, "adv_loss": None if n == "D" else 2.0,
             "clean_accuracy": 0.5, "adv_accuracy": None if n == "D" else 0.25,
             "monitor": {"pgd_accuracy": 0.75, "fgsm_accuracy": 0.9, "alignment": 0.5, "overfitting": n == "D_adv"}
             if step == 10 and n != "D" else None}
            for n in names for s in range(seeds) for step in (5, 10)]


@pytest.fixture
def run(tmp_path):
    body = results()
    (tmp_path / "results.json").write_text(json.dumps(body))
    (tmp_path / "config.json").write_text(json.dumps({"eps": 0.3, "model": EVIL, "static": ["a", "b"]}))
    lines = metrics(body["models"]) + metrics(["source-A"])[:1]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clean = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    guesses = {row: {EVIL: np.array([0, 1, 5])} for row in ("clean", "fgsm", EVIL)}
    pictures = {"clean": clean, "fgsm": clean // 2, EVIL: clean}
    examples.Samples("A", np.arange(3), pictures, guesses).save(tmp_path / examples.FILE)
    return tmp_path


def test_the_page_of_a_training_run_shows_the_numbers_of_its_results(run):
    body = results()
    assert report.write(run) == run / "report.html"
    text = (run / "report.html").read_text()
    reader = read(text)
    assert len(text) < 3e6 and reader.all("title") and EVIL in reader.text
    models = body["models"]
    errors = {row[0]: row[1:] for row in reader.tables[0][1:]}
    assert reader.tables[0][0] == ["", *models]

    def cells(get):
        return [f"{100 * get(m):.1f}± {100 * get(m['std']):.1f}" for m in models.values()]

    def plain(row):
        return [cell.lstrip("●○") for cell in row]

    assert plain(errors["clean"]) == cells(lambda m: m["clean"])
    for title, attack in (("FGSM", "fgsm"), ("R+FGSM", "rand_fgsm"), ("mine", "mine")):
        assert plain(errors[f"white-box {title}"]) == cells(lambda m, a=attack: m["white_box"][a])
        (table,) = (t for t in reader.tables[1:4] if plain(t[1][1:]) == cells(lambda m, a=attack: m["white_box"][a]))
        assert table[1][0] == "the model itself"
        for row, (source, role) in zip(table[2:], body["sources"].items(), strict=True):
            assert row == [f"{source} ({role.replace('_', '-')})",
                           *cells(lambda m, a=attack, s=source: m["black_box"][a][s])]
    for key, words in train_page.SUMMARY.items():
        assert plain(errors[f"black-box, {words}"]) == cells(lambda m, k=key: m[k])
        best = min(models.values(), key=lambda m, k=key: m[k])[key]
        assert f"●{100 * best:.1f}" in " ".join(errors[f"black-box, {words}"])
    for m in models.values():
        assert f"{100 * m['max_black_box']:.1f} %" in reader.text
        assert f"{100 * max(m['white_box'].values()):.1f} %" in reader.text
    assert "eps 0.3" in reader.text and "2 seeds" in reader.text and "12 s" in reader.text
    assert ["static", "a b"] in reader.tables[-3] and ["total", "12"] in reader.tables[-1]
    assert [c.text in reader.text for c in train_page.claims_of(body)] == [True, True]


def test_claims_of_the_papers_go_by_the_intervals_of_the_run(run):
    body = results()
    assert report.write(run).read_text().count("not decidable at this size") == 2  # of a run of version 0.1
    body["claims"] = [{"text": f"Claim {holds}", "holds": holds, "numbers": "1 to 2"} for holds in (True, False, None)]
    (run / "results.json").write_text(json.dumps(body))
    reader = read(report.write(run).read_text())
    for words in ("✓ holds Claim True", "✗ does not hold Claim False", "? not decidable at this size Claim None"):
        assert words in reader.text, words


@pytest.mark.parametrize("open_check, worst, outcome", [
    (True, 1.0, "? undecided: more --images"), (False, 1.0, "✗ not robust"), (False, 0.3, "✓ not masked"),
    (True, 0.3, "? undecided: more --images")])
def test_nothing_green_stands_beside_an_open_check_or_an_error_of_everything(tmp_path, open_check, worst, outcome):
    body = diagnosed(tmp_path)
    (masking,) = {id(m["masking"]): m["masking"] for n, m in body["models"].items() if n == "D"}.values()
    masking |= {"masked": False, "worst_case": {"value": worst, "low": worst - 0.1, "high": worst, "n": 40},
                "checks": [{**c, "status": "passed"} for c in masking["checks"]]}
    if open_check:
        masking["checks"][1]["status"] = "not decidable at this sample size"
    del body["models"][EVIL]
    (tmp_path / "results.json").write_text(json.dumps(body))
    reader = read(report.write(tmp_path).read_text())
    assert f"{outcome} D: 10.0 % error on clean images, {100 * worst:.1f} % under attack" in reader.text


def test_training_curves_are_those_of_the_metrics(run):
    report.write(run)
    text = (run / "report.html").read_text()
    # Mean over two seeds of 1/5 and 1/5 + 1, and adversarial samples only of models that had some.
    assert "<title>D: 0.700 at 5</title>" in text and "<title>D_ens: 25.0 at 10</title>" in text
    assert "<title>D: 25.0 at 10</title>" not in text and "<title>A: 1.200 at 5</title>" not in text
    looks = {a["class"] for a in read(text).all("polyline")}
    assert looks == {"line s0", "line s1", "line s2", "line s3"}
    assert "Sources" in text and "<title>D_ens: 75.0 at 10</title>" in text
    assert "✗ overfits D_adv, seed 1 at step 10" in read(text).text and "✗ overfits D_ens" not in read(text).text


def test_speed_is_that_of_the_metrics(run):
    report.write(run)
    assert "Speed" not in read((run / "report.html").read_text()).text  # an old run folder, without these keys
    old = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in old.splitlines()]
    for line in lines:
        seed = int(line["job"][-1])
        line |= {"images_per_second": 100.0 + 50 * seed, "share_data": 0.125, "share_attack": 0.25 + seed / 8,
                 "share_train": 0.5, "peak_memory": None if line["job"].startswith("D-") else 2.5e9,
                 "skipped": 3 if (line["job"], line["step"]) == ("D_ens-seed1", 10) else 0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader = read(report.write(run).read_text())
    for words in ("Speed", "Throughput", "Time in crafting", "Time in waiting for data", "Time in training steps",
                  "Peak memory so far", "✗ skipped D_ens-seed1: up to 3 images of an epoch They could not be read."):
        assert words in reader.text, words
    # Means over seeds; a source is one of the networks that took time.
    for title in ("D: 125 at 5", "A-seed0 (source): 100 at 5", "D: 31.2 at 10", "D_adv: 12.5 at 5", "D_ens: 2.5 at 10"):
        assert title in reader.titles, title
    assert "D: 2.5 at 5" not in reader.titles and "skipped D_adv" not in reader.text


def test_examples_show_what_was_seen_and_what_it_was_taken_for(run):
    report.write(run)
    reader = read((run / "report.html").read_text())
    found = examples.load(run / examples.FILE)
    images = reader.all("img")
    assert len(images) == 3 * (1 + 2 + 2)
    assert np.array_equal(decoded(images[0]["src"]), found.pictures["clean"][0])
    assert np.array_equal(decoded(images[4]["src"]), found.pictures["fgsm"][1])
    difference = decoded(images[6]["src"]).astype(float)
    want = 128 + (found.pictures["fgsm"][0].astype(float) - found.pictures["clean"][0]) * 127 / 76.5
    assert np.abs(difference - want.clip(0, 255)).max() <= 0.5
    assert [a for a in reader.all("span") if a.get("class") == "wrong"] == [{"title": EVIL, "class": "wrong"}] * 3


def test_the_same_folder_gives_the_same_page(run):
    pages = [report.write(run).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]
    assert not list(run.glob("*.tmp"))


def test_one_seed_no_held_out_source_and_no_other_files(tmp_path):
    body = results(seeds=1)
    body["sources"] = {}
    for m in body["models"].values():
        m |= dict.fromkeys(train_page.SUMMARY)
    del body["command"]  # older runs have none
    (tmp_path / "results.json").write_text(json.dumps(body))
    reader = read(report.write(tmp_path).read_text())
    assert "±" not in reader.text and "black-box, " not in reader.text and "one seed" in reader.text
    assert not reader.all("img") and "Training" not in reader.text


SECTIONS = [
    {"title": EVIL, "blocks": [
        {"block": "text", "paragraphs": [EVIL]},
        {"block": "checklist", "items": [{"state": "open", "claim": EVIL}]},
        {"block": "flow", "blocks": [
            {"block": "table", "head": ["", "x"], "rows": [["a", {"value": 0.5, "low": 0.4, "high": 0.6}]]},
            {"block": "heatmap", "rows": ["a"], "columns": ["b"], "values": [[0.5]]}]},
        {"block": "scale", "low": "0", "high": "1"},
        {"block": "folded", "title": EVIL, "blocks": [{"block": "key_values", "title": "k", "values": {"a": 1}}]}]},
    {"title": "figures", "blocks": [{"block": "grid", "blocks": [
        {"block": "curves", "series": [{"name": "a", "x": [0, 1], "y": [0, 1]}], "title": "t", "x_label": "x",
         "y_label": "y"},
        {"block": "surface", "values": [[0, 1], [1, 0]], "x": [0, 1], "y": [0, 1], "title": "t", "x_label": "x",
         "y_label": "y", "z_label": "z"}]}]},
    {"title": "empty"}]


@pytest.mark.parametrize("command", ["evaluate", "diagnose"])
def test_results_may_bring_sections_as_data(tmp_path, command):
    body = {"command": command, "title": EVIL, "verdict": "Suspicious.", "facts": ["10 images"], "sections": SECTIONS}
    (tmp_path / "results.json").write_text(json.dumps(body))
    reader = read(report.write(tmp_path).read_text())
    for words in ("Suspicious.", "10 images", "50.0 40.0 to 60.0", "? not decidable"):
        assert words in reader.text
    used = {b["block"] for s in SECTIONS for b in s.get("blocks", [])} | {"table", "heatmap", "curves", "surface",
                                                                          "key_values"}
    assert used == set(layouts.BLOCKS)


@pytest.mark.parametrize("block, error", [({"block": "pie"}, "report: block must be one of text, table.*got 'pie'"),
                                          ({}, "report: block must be one of .*, got None"),
                                          ({"block": "text", "paragraf": []}, "report: block text: .*paragraf")])
def test_wrong_blocks_are_named(block, error):
    with pytest.raises(ValueError, match=error):
        layouts.block(block)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="report: no results in"):
        report.write(tmp_path)
    (tmp_path / "results.json").write_text('{"command": "party"}')
    with pytest.raises(ValueError, match="report: command must be one of train, evaluate, diagnose, got 'party'"):
        report.write(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="report: a file of the run in .* is corrupt"):
        report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


# ------------------------------------------------------------------------------------- evaluate and diagnose


def rate(count, n=40):
    return {"value": count / n, "count": count, "n": n, "low": max(0.0, count / n - 0.05), "high": count / n + 0.05}


def evaluated():
    """results.json of an evaluation: D attacked itself, D_ens too, and both see what was crafted on EVIL."""
    counts = {("fgsm", "D", "D"): 40, ("fgsm", "D_ens", "D_ens"): 22, ("fgsm", EVIL, "D"): 30,
              ("fgsm", EVIL, "D_ens"): 10, ("mine", EVIL, "D"): 33, ("mine", EVIL, "D_ens"): 7}
    cells = [{"attack": a, "source": s, "target": t, "white_box": s == t, "error": {"top1": rate(c), "top5": None},
              "transfer_rate": {"top1": rate(c // 2) if s == EVIL else None, "top5": None}}
             for (a, s, t), c in counts.items()]
    curve = {"attack": "fgsm", "source": "D", "target": "D", "white_box": True, "eps": [0.0, 0.1],
             "top1": [rate(39), rate(1)], "top5": [rate(40), rate(9)]}
    matrix = {"n": 40, "data": None, "attacks": ["fgsm", "mine"], "sources": [EVIL, "D", "D_ens"],
              "targets": ["D", "D_ens"], "cells": cells,
              "clean": {"D": {"top1": rate(2), "top5": None}, "D_ens": {"top1": rate(3), "top5": None}},
              "tied_targets": [{"attack": "fgsm", "source": EVIL, "targets": ["D_ens"]}]}
    summary = {"max": 0.825, "mean": 0.7, "worst_case": 0.9, "max_interval": [0.8, 0.85],
               "worst_case_interval": [0.85, 0.95], "pair": ["mine", EVIL], "tied": [], "n": 40}
    return {"command": "evaluate", "dataset": "digits", "eps": 0.3, "matrix": matrix, "curves": [curve],
            "models": {"D": {"black_box_summary": summary}, "D_ens": {"black_box_summary": None}},
            "sets": [{"source": EVIL, "attack": "mine", "eps": 8 / 255, "folder": "x"}]}


def test_the_page_of_an_evaluation(tmp_path):
    body = evaluated()
    (tmp_path / "results.json").write_text(json.dumps(body))
    text = report.write(tmp_path).read_text()
    reader = read(text)
    errors, *matrices = reader.tables
    assert errors == [
        ["", "D", "D_ens"], ["clean", "●5.00.0 to 10.0", "○7.52.5 to 12.5"],
        ["white-box FGSM", "100.095.0 to 105.0", "●55.050.0 to 60.0"],
        ["black-box, highest", "82.580.0 to 85.0", "–"], ["black-box, mean", "70.0", "–"],
        ["black-box, worst case per example", "90.085.0 to 95.0", "–"]]
    fgsm, mine, fgsm_rate, mine_rate, ties = matrices[:5]
    assert fgsm[1:] == [["the target itself", "100.095.0 to 105.0", "55.050.0 to 60.0"],
                        [EVIL, "75.070.0 to 80.0", "25.020.0 to 30.0"]]
    assert [row[0] for row in mine[1:]] == [EVIL] and mine[1][1].startswith("82.5")
    assert [row[1][:4] for row in (fgsm_rate[2], mine_rate[1])] == ["37.5", "40.0"]
    assert ties[1] == ["FGSM", EVIL, "D_ens"]
    assert "transferred attacks: D_ens 25.0 %, D 82.5 %. Under white-box" in reader.text
    assert "attacks: D_ens 55.0 %, D 100.0 %." in reader.text
    assert f"their own eps: mine on {EVIL}, eps 8/255." in reader.text
    assert "40 test inputs" in reader.text and "<title>FGSM, white-box: 2.5 at 0.1</title>" in text
    assert sum("own" in (a.get("class") or "") for a in reader.all("td")) == 4  # once by error, once by transfer rate


def test_an_evaluation_without_summaries_and_of_a_target_among_the_sources(tmp_path):
    body = evaluated()
    del body["models"], body["curves"], body["sets"], body["matrix"]["tied_targets"]
    cells = body["matrix"]["cells"]
    cells.append({**cells[2], "source": "D", "target": "D_ens", "error": {"top1": rate(5)}})
    (tmp_path / "results.json").write_text(json.dumps(body))
    errors, fgsm, *_ = read(report.write(tmp_path).read_text()).tables
    assert errors[-1] == ["transferred, highest", "82.577.5 to 87.5", "●25.020.0 to 30.0"]
    assert fgsm[1:] == [["the target itself", "–", "55.050.0 to 60.0"], [EVIL, "75.070.0 to 80.0", "25.020.0 to 30.0"],
                        ["D", "100.095.0 to 105.0", "12.57.5 to 17.5"]]


def diagnosed(folder):
    """results.json of a diagnosis of two models, one of them without most measurements, and its example images."""
    def interval(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40}

    checks = [{"name": "single step against many", "status": "suspicious", "numbers": {}, "sentence": EVIL},
              {"name": "growing eps", "status": "passed", "sentence": "It grows.",
               "numbers": {"error": {"0.5": interval(0.2), "0": interval(0.1), "10": interval(0.9)}}},
              {"name": "label leaking", "status": "not decidable at this sample size", "numbers": {},
               "sentence": "Few."}]
    masking = {"checks": checks, "verdict": "The model masks its gradients: a. More words. End.", "masked": True,
               "errors": {"clean": interval(0.1), "FGSM": interval(0.5)}, "worst_case": interval(0.6),
               "strongest": "FGSM"}
    rows = {"clean": 10, "fgsm": 30}
    pictures = {row: np.full((2, 8, 8), shade, np.uint8) + np.array([[[0]], [[1]]], np.uint8)
                for row, shade in rows.items()}
    examples.Samples(EVIL, np.arange(2), pictures, {row: {EVIL: np.zeros(2, np.int64)} for row in rows}).save(
        folder / "own.npz")
    full = {"masking": masking, "gradient_norm": {"mean_l2": 0.1234}, "gradient_alignment": {"mean": None},
            "random_start_gap": {"gap": interval(-0.04)}, "label_leaking": {"leaked": {"predicted": 7}, "advantage":
                                                                            interval(0.2)},
            "cone_dimension": {"at_least": {"1": interval(0.8), "16": interval(0.3), "4": interval(0.5)}},
            "surfaces": [{"other": None, "eps": 0.3, "along": [-0.3, 0.3], "across": [-0.3, 0.3],
                          "loss": [[[0, 1], [2, 3]], [[1, None], [1, 1]]], "labels": [4, 5]}], "examples": "own.npz"}
    return {"command": "diagnose", "dataset": "digits", "eps": 0.3, "images": 40, "seconds": 2.5,
            "models": {EVIL: full, "D": {"masking": {**masking, "masked": None}, "spec": "mnist:D"}}}


def test_the_page_of_a_diagnosis(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(diagnosed(tmp_path)))
    text = report.write(tmp_path).read_text()
    reader = read(text)
    assert ("Error under all attacks tried together: D 60.0 %. Where gradients are masked, the error is at least: "
            f"{EVIL} 60.0 %. Masked gradients: {EVIL}. Undecided: D.") in reader.text  # robustness first
    for words in (f"{EVIL}: 10.0 % error on clean images, at least 60.0 % under attack", "D: 10.0 % error on clean "
                  "images, 60.0 % under attack"):
        assert words in reader.text
    for words in ("✗ masked", "? undecided: more --images", "✗ suspicious", "✓ passed", "? not decidable", "It grows.",
                  "40 test images", "2 s", f"{EVIL}: image 1, class 4, within eps 0.3",
                  f"{EVIL} around other images (1)", f"{EVIL}, single step against many", "Checks of D in words"):
        assert words in reader.text, words
    checks, errors, measured, *_ = reader.tables
    assert checks == [["", EVIL, "D"], ["single step against many", "✗ suspicious", "✗ suspicious"],
                      ["growing eps", "✓ passed", "✓ passed"], ["label leaking", "? not decidable", "? not decidable"]]
    assert errors[1] == ["clean", "10.00.0 to 20.0", "10.00.0 to 20.0"] and errors[-1][0] == "any of these"
    assert measured[1:] == [["mean L2 norm of the gradient", "0.123", "–"],
                            ["R+FGSM minus FGSM, percentage points", "-4.0-14.0 to 6.0", "–"],
                            ["accuracy under FGSM minus clean, percentage points", "20.010.0 to 30.0", "–"],
                            ["labels leaked, beside predicted labels", "7", "–"]]
    points = [t for t in reader.titles if t.startswith(f"{EVIL}: ")]
    assert [p.split(": ")[-1] for p in dict.fromkeys(points)] == [
        "10.0 at 0", "20.0 at 0.5", "90.0 at 10", "80.0 at 1", "50.0 at 4", "30.0 at 16"]
    # loss[i][j] is at along[i], across[j]: to the right it grows by 2, upward by 1.
    picture = decoded(reader.all("image")[0]["href"]).sum(axis=2).astype(int)
    assert picture[-1, 0] < picture[0, 0] < picture[-1, -1] < picture[0, -1]
    pictures = [decoded(a["src"]) for a in reader.all("img")]
    assert [int(p[0, 0]) for p in pictures] == [10, 11, 30, 31, 161, 161]  # 128 + 20 * 127 / 76.5
    assert len([a for a in reader.all("span") if a.get("class") == "wrong"]) == 2
