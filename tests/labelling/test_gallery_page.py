"""The page of a labelling: every section and reason in words, a bounded choice, and nothing that a name could break."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.coco import read_coco
from simdetr.data.images import ImageSource, open_images
from simdetr.data.labels import Labels
from simdetr.labelling import gallery_page
from simdetr.labelling.autolabel import AutolabelRun, AutolabelSettings, verified
from simdetr.labelling.candidates import REASONS, Candidates, quality
from simdetr.labelling.crop_features import crop_encoder
from simdetr.labelling.gallery_page import BEFORE, LABEL, STAGES, render_gallery_page, write_gallery_page
from simdetr.labelling.shots import LabellingInputs

SECTIONS = ("stages", "gallery", "labels", "corrections", "rejects", "numbers", "next", "config")
VOID = {"img", "meta", "br", "path", "use", "rect"}
REJECTED = ("low_score", "other_class", "negative", "duplicate", "outside", "holds_shots")


class Page(HTMLParser):
    """Tags, sources, links and text by section; fails on elements that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.links, self.section, self.parts = [], [], [], [], "", {"": ""}
        self.pictures = {"": 0}
        self.feed(text)
        assert self.open == []
        self.parts = {name: " ".join(part.split()) for name, part in self.parts.items()}
        self.text = " ".join(self.parts.values())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        self.sources += [values["src"]] if "src" in values else []
        self.links += [values[name] for name in ("href", "xlink:href") if name in values]
        if tag == "section":
            self.section = values["id"]
            self.parts[self.section], self.pictures[self.section] = "", 0
        self.pictures[self.section] += tag == "img"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.parts[self.section] += " " + data


class Case:
    """A run with hand-made candidates: every true box of the last eight scenes, and one of each reason."""

    def __init__(self, folder, scenes, moved=6.0):
        source, truth = open_images(scenes), read_coco(scenes / "instances.json")[0]
        shots = truth.select(truth.image_ids[:4])
        found = truth.select(truth.image_ids[4:])
        count = len(found.boxes_xyxy)
        found = replace(found, scores=np.linspace(0.3, 0.9, count, dtype=np.float32))
        reason = np.full(count, "", object)
        reason[: len(REJECTED)] = REJECTED
        own = [int(np.flatnonzero(shots.classes == c)[0]) if (shots.classes == c).any() else 0 for c in found.classes]
        evidence = {
            "vote": found.classes.copy(),
            "margin": np.linspace(0.01, 0.8, count, dtype=np.float32),
            "nearest_0": np.array(own),
            "nearest_1": np.full(count, 1),
            "similarity_0": np.full(count, 0.9, np.float32),
            "similarity_1": np.full(count, 0.2, np.float32),
            "shift": np.where(reason == "", 0.8, 1.0).astype(np.float32),
        }
        evidence["vote"][1:3] = (found.classes[1] + 1) % found.num_classes, -1
        self.boxes = found.boxes_xyxy + np.where(reason == "", moved, 0)[:, None].astype(np.float32)
        self.candidates = Candidates(found, reason, evidence)
        self.inputs = LabellingInputs(source, found.image_ids, shots, truth.select(truth.image_ids[:1]), truth=truth)
        self.run, self.settings = AutolabelRun(folder), AutolabelSettings(background_shots=0)
        self.write_records()

    def write_records(self):
        counts = self.candidates.counts()
        early = {name: counts.get(name, 0) for name in ("holds_shots",)}
        late = {name: count for name, count in counts.items() if name != "duplicate"}
        before = {"kept": sum(counts.values()) - sum(early.values()), **early}
        rows = []
        for stage, own in zip(STAGES, (before, {**late, "kept": late.get("kept", 0) + 1}, counts), strict=True):
            rows.append({"stage": stage, "counts": {name: count for name, count in own.items() if count}})
            if self.inputs.truth is not None:
                rows[-1]["quality"] = quality(self.candidates, self.boxes, self.inputs.truth)
        self.run.stages.write_text(json.dumps(rows), encoding="utf-8")

    def text(self):
        return render_gallery_page(self.run, self.inputs, self.candidates, self.boxes, self.settings)

    def page(self):
        page = Page(self.text())
        assert tuple(page.parts)[1:] == SECTIONS
        return page


@pytest.fixture
def case(tmp_path, scenes):
    return Case(tmp_path, scenes)


def test_every_section_is_there_and_nothing_from_outside(case):
    page = case.page()
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert {link[1:] for link in page.links if not link.startswith("#m")} >= set(SECTIONS)
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags and page.tags.count("svg") == 2
    assert "Not shown" not in page.text and "cannot be read, and" not in page.text
    assert all(page.pictures[name] for name in ("gallery", "labels", "corrections", "rejects"))
    for command in ("simdetr evaluate", "simdetr predict", "simdetr finetune", str(case.run.detector)):
        assert command in page.parts["next"]
    assert '"corrector_steps": 150' in page.parts["config"]


def test_the_same_run_makes_the_same_page(case):
    strip = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d")
    assert strip.sub("", case.text()) == strip.sub("", case.text())


def test_numbers_of_the_head(case):
    page, kept = case.page(), len(case.candidates.kept)
    total = len(case.candidates.reason)
    head = page.parts["stages"]
    assert f"labels {kept} on " in head
    assert f"rejected {100 * len(REJECTED) / total:.1f} % of {total} detections" in head
    assert f"rejected by the shots {100 * 2 / (kept + 3):.1f} % of {kept + 3} with enough score" in head
    scores = quality(case.candidates, case.boxes, case.inputs.truth)
    assert f"{100 * scores['precision']:.1f} % {100 * scores['recall']:.1f} % {scores['mean_iou']:.3f}" in head
    # each stage tells what it rejected itself
    first, second, third = (head.index(title) for title in gallery_page.STAGES.values())
    assert first < head.index(f"1: {REASONS['holds_shots']}") < second
    assert second < head.index(f"1: {REASONS['other_class']}") < third < head.index(f"1: {REASONS['duplicate']}")
    assert head.count(REASONS["holds_shots"]) == 1


def test_rejects_come_with_reasons_in_words_and_the_shots_that_outvoted_them(case):
    part, names = case.page().parts["rejects"], case.inputs.shots.categories
    for code in REJECTED:
        assert f"1: {REASONS[code]}" in part
    assert part.index(REASONS["other_class"]) < part.index(REASONS["low_score"])
    own = case.candidates.labels.classes[1]
    assert f"votes: {names[case.candidates.evidence['vote'][1]].name}" in part and names[own].name in part
    assert "votes: none of the classes" in part


def test_a_box_outside_its_image_is_told_without_picture(case):
    case.boxes[4] += 500
    moved = case.candidates.labels.boxes_xyxy.copy()
    moved[4] += 500
    case.candidates = replace(case.candidates, labels=replace(case.candidates.labels, boxes_xyxy=moved))
    assert "no picture" in case.page().parts["rejects"]


def test_nearest_are_those_of_the_class_that_won_where_a_candidate_was_outvoted(case):
    shots = gallery_page._Shots(["a"] * 4, np.zeros((4, 4), np.float32), np.array([0, 1, 1, 2]))
    labels = Labels.from_images(
        [ImageLabels.build("a", (9, 9), [[0, 0, 5, 5]] * 2, [0, 0])], case.inputs.shots.categories
    )
    order = {f"nearest_{i}": np.array([row, row]) for i, row in enumerate((3, 0, 2, 1))}
    order |= {f"similarity_{i}": np.array([0.9 - i / 10] * 2) for i in range(4)}
    found = Candidates(labels, np.array(["other_class", ""], object), {"vote": np.array([1, 0]), **order})
    assert [row for row, _ in gallery_page._nearest(found, 0, shots)] == [2, 1, 3]
    assert [row for row, _ in gallery_page._nearest(found, 1, shots)] == [3, 0, 2]
    gone = Candidates(labels, found.reason, {"vote": np.array([-2, 0]), "nearest_0": np.array([-1, 0])} | {
        "similarity_0": np.array([np.nan, 0.5])
    })  # fmt: skip
    assert gallery_page._nearest(gone, 0, shots) == []


def test_the_least_sure_labels_come_first(case):
    chosen = gallery_page._choose(case.candidates)
    margin = case.candidates.evidence["margin"]
    assert margin[chosen.unsure].tolist() == sorted(margin[chosen.unsure])
    assert set(chosen.unsure).isdisjoint(chosen.sure)
    assert not chosen.sure or margin[chosen.sure].min() > margin[chosen.unsure].min()
    assert (case.candidates.reason[chosen.unsure + chosen.sure] == "").all()


def test_one_class_does_not_take_all_places():
    rows, classes = np.arange(10), np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 2])
    assert gallery_page._varied(rows, classes, 6) == [0, 1, 2, 7, 8, 9]
    assert gallery_page._varied(rows[:7], classes, 6) == [0, 1, 2, 3, 4, 5]
    assert gallery_page._varied(rows[:0], classes, 6) == []


def test_corrections_show_both_boxes_and_what_they_were_worth(case):
    page = case.page()
    before, after = (
        quality(case.candidates, boxes, case.inputs.truth)["mean_iou"]
        for boxes in (case.candidates.labels.boxes_xyxy, case.boxes)
    )
    assert before == pytest.approx(1) and after < 0.95
    assert f"Mean IoU with the truth: {before:.3f} before, {after:.3f} after" in page.parts["corrections"]
    assert "Moved most" in page.parts["corrections"] and "IoU 0.80" in page.parts["corrections"]
    still = case.candidates.with_evidence(shift=np.ones(len(case.boxes), np.float32))
    case.candidates, case.boxes = still, case.candidates.labels.boxes_xyxy
    assert "Not shown: no box was moved" in case.page().parts["corrections"]


def test_pictures_frame_the_boxes():
    image = torch.full((3, 100, 200), 90, dtype=torch.uint8)
    boxes = np.array([[20, 30, 60, 70], [30, 30, 70, 70]], np.float32)
    pixels = np.asarray(gallery_page._framed(image, boxes, [BEFORE, LABEL], 0.4, 220)).reshape(-1, 3)
    assert all((pixels == colour).all(axis=1).any() for colour in (BEFORE, LABEL))
    assert gallery_page._framed(image, boxes[:1] + 500, [LABEL], 0.2, 128) is None
    edge = gallery_page._framed(image, np.array([[190, 90, 230, 130]], np.float32), [LABEL], 0.2, 128)
    assert max(edge.size) == 128
    assert gallery_page._crop(image, boxes[0] - 500) is None
    assert gallery_page._crop(image, boxes[0]).size == (gallery_page.SHOT_PX, gallery_page.SHOT_PX)


def test_markup_in_names_stays_text(case, tmp_path):
    evil = "<script>alert('x')</script>\"&"
    names = tuple(replace(c, name=f"{evil}{c.id}") for c in case.inputs.shots.categories)
    folder = tmp_path / "images"
    renamed = {}
    for number, image_id in enumerate(case.inputs.images.ids):
        renamed[image_id] = f"<b>{number}&.jpg"
        folder.mkdir(exist_ok=True)
        (folder / renamed[image_id]).write_bytes(case.inputs.images.path_of(image_id).read_bytes())

    def odd(labels):
        return replace(labels, categories=names, image_ids=tuple(renamed[i] for i in labels.image_ids))

    inputs, labels = case.inputs, odd(case.candidates.labels)
    case.candidates = replace(case.candidates, labels=labels)
    case.inputs = replace(
        inputs,
        images=ImageSource(folder, [renamed[i] for i in inputs.images.ids]),
        pool=labels.image_ids,
        **{name: odd(getattr(inputs, name)) for name in ("shots", "negatives", "truth")},
    )
    assert "<script" not in case.text() and "<b>4&" not in case.text()
    page = case.page()
    assert "script" not in page.tags and f"{evil}1" in page.text and "<b>4&.jpg" in page.text


def test_unreadable_images_are_left_out_with_a_note(case, tmp_path, scenes):
    folder = tmp_path / "some"
    folder.mkdir()
    first, *others = case.candidates.labels.image_ids
    for image_id in case.inputs.images.ids:
        content = b"broken" if image_id == first else case.inputs.images.path_of(image_id).read_bytes()
        (folder / image_id).parent.mkdir(parents=True, exist_ok=True)
        (folder / image_id).write_bytes(content)
    case.inputs = replace(case.inputs, images=ImageSource(folder, case.inputs.images.ids))
    page = case.page()
    assert f"1 image that would be shown here cannot be read, and is left out: {first}" in page.parts[""]
    assert first not in page.parts["labels"] and any(other in page.parts["labels"] for other in others)


def test_nothing_kept_says_why(case):
    reason = np.full(len(case.candidates.reason), "other_class", object)
    reason[:2] = "low_score"
    case.candidates = replace(case.candidates, reason=reason)
    case.write_records()
    page = case.page()
    assert (
        f"No candidate became a label, so there is nothing new to learn. Most often: {REASONS['other_class']}"
        in (page.parts[""])
    )
    assert "Not shown: no candidate became a label" in page.parts["labels"]
    assert "without a single new label" not in page.text


def test_no_candidate_at_all(case):
    labels = case.candidates.labels.rows(np.zeros(0, np.int64))
    case.candidates = Candidates(labels, np.zeros(0, object))
    case.boxes = np.zeros((0, 4), np.float32)
    case.write_records()
    page = case.page()
    assert "The detector found nothing" in page.parts[""] and "svg" not in page.tags
    assert "rejected – of 0 detections" in page.parts["stages"]
    assert page.pictures["gallery"] and not page.pictures["rejects"]


def test_without_truth_nothing_is_measured(case):
    case.inputs = replace(case.inputs, truth=None)
    case.write_records()
    page = case.page()
    assert "Precision and recall are not shown: there is no truth" in page.parts["stages"]
    assert "mean IoU" not in page.text and "truth:" not in page.text and "with the truth" not in page.text


def test_cards_say_what_is_really_there(case):
    shown = case.page().parts
    names = {c.name for c in case.inputs.shots.categories}
    assert any(f"truth: {name}" in shown["labels"] for name in names)
    own = case.inputs.truth.of(case.candidates.labels.image_ids[0])
    categories = case.inputs.shots.categories
    assert gallery_page._true_name(own.boxes_xyxy[0], own, categories) == categories[own.classes[0]].name
    assert gallery_page._true_name(own.boxes_xyxy[0] + 500, own, categories) == "no object"


def test_one_class_without_negatives_is_warned_of(case):
    one = (Category(1, "thing"),)
    flat = {name: getattr(case.inputs, name).class_agnostic() for name in ("shots", "truth")}
    case.inputs = replace(
        case.inputs, negatives=None, **{name: replace(own, categories=one) for name, own in flat.items()}
    )
    labels = replace(case.candidates.labels.class_agnostic(), categories=one)
    count = len(labels.boxes_xyxy)
    case.candidates = replace(case.candidates, labels=labels).with_evidence(
        vote=np.zeros(count, np.int64), margin=np.full(count, np.inf, np.float32)
    )
    page = case.page()
    assert "All shots are of one class" in page.parts[""]
    assert "margin inf" not in page.text and page.pictures["labels"]


def test_a_collapsed_class_and_empty_ones_are_warned_of(case):
    classes = case.candidates.labels.classes.copy()
    classes[:] = 0
    classes[-1] = 1
    case.candidates = replace(case.candidates, labels=replace(case.candidates.labels, classes=classes))
    case.settings = replace(case.settings, max_ratio=1.5)
    page, names = case.page(), case.inputs.shots.categories
    count = int(((classes == 0) & (case.candidates.reason == "")).sum())
    assert f"{names[0].name} has {count} labels, far more than the other classes" in page.parts[""]
    assert f"{names[0].name} far too many?" in page.parts["numbers"]
    assert "Classes without a single new label" in page.parts[""]


def test_many_classes_and_candidates_make_no_large_page(tmp_path):
    draw = np.random.default_rng(0)
    folder = tmp_path / "noise"
    folder.mkdir()
    ids = [f"{number:02d}.jpg" for number in range(40)]
    for name in ids:
        noise = draw.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / name, quality=95)
    categories = tuple(Category(own + 1, f"class {own}") for own in range(60))

    def labels(each):
        corners = draw.uniform(0, 30, (len(ids), each, 2))
        return Labels.from_images(
            [
                ImageLabels.build(
                    name, (64, 64), np.concatenate([low, low + 30], axis=1), draw.integers(0, 60, each),
                    draw.uniform(0, 1, each),
                )
                for name, low in zip(ids, corners, strict=True)
            ],
            categories,
        )  # fmt: skip

    shots, found = labels(40), labels(500)
    count = len(found.boxes_xyxy)
    reason = draw.choice(np.array(list(REASONS), object), count)
    evidence = {"vote": draw.integers(-2, 60, count), "margin": draw.uniform(0, 1, count)}
    evidence |= {f"nearest_{i}": draw.integers(0, len(shots.boxes_xyxy), count) for i in range(4)}
    evidence |= {f"similarity_{i}": draw.uniform(0, 1, count) for i in range(4)}
    evidence |= {"shift": draw.uniform(0.3, 1, count)}
    candidates = Candidates(found, reason, evidence)
    inputs = LabellingInputs(ImageSource(folder, ids), tuple(ids), shots)
    run = AutolabelRun(tmp_path)
    run.stages.write_text(json.dumps([{"stage": s, "counts": candidates.counts()} for s in STAGES]), encoding="utf-8")
    place = write_gallery_page(run, inputs, candidates, found.boxes_xyxy, AutolabelSettings())
    assert place == run.report and [path.name for path in place.parent.iterdir()] == ["index.html"]
    assert place.stat().st_size < 3.2e6  # of noise, which no picture is
    page = Page(place.read_text(encoding="utf-8"))
    assert page.parts["gallery"].count("shots") <= gallery_page.CLASSES_SHOWN + 1
    assert "36 more classes are not shown" in page.parts["gallery"]
    assert page.pictures["gallery"] <= gallery_page.CLASSES_SHOWN * gallery_page.SHOTS_SHOWN
    assert "20 more" in page.parts["numbers"]
    sizes = {Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size for source in page.sources}
    assert max(max(size) for size in sizes) == gallery_page.MOVED_PX


def test_evidence_counts_the_shots_as_the_page_does(case, tmp_path):
    """Also where the gallery lacks some, for their image cannot be read: a shot itself is nearest to its own box."""
    folder, inputs = tmp_path / "some", case.inputs
    for image_id in inputs.images.ids:
        broken = image_id == inputs.shots.image_ids[0]
        (folder / image_id).parent.mkdir(parents=True, exist_ok=True)
        (folder / image_id).write_bytes(b"broken" if broken else inputs.images.path_of(image_id).read_bytes())
    shots = inputs.shots.select(inputs.shots.image_ids[:3])
    denied = case.inputs.truth.select(inputs.truth.image_ids[5:6])
    inputs = replace(inputs, images=ImageSource(folder, inputs.images.ids), shots=shots, negatives=denied)
    both = Labels.from_images([*map(shots.image, range(3)), denied.image(0)], shots.categories)
    settings = replace(case.settings, score_rule="absolute", min_score=0.0, looks_per_image=1000, neighbours=2)
    encoder, none = crop_encoder("colour-texture"), both.rows(np.zeros(0, np.int64))
    found = verified(case.run, inputs, Candidates.of(both), encoder, settings, "cpu", left_out=dict)
    unread = int(shots.offsets[1])
    rows = np.arange(len(both.boxes_xyxy))
    assert found.evidence["nearest_0"].tolist() == np.where(rows < unread, -1, rows).tolist()
    assert set(found.reason[:unread]) == {"unreadable"}
    counted = gallery_page._Shots.of(inputs, none)
    assert counted.boxes_xyxy.tolist() == both.boxes_xyxy.tolist()
    assert (counted.classes[len(shots.boxes_xyxy) :] == -1).all()
