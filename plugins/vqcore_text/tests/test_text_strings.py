"""Boxes, keypoints, palettes and metadata as text: closed forms, both ways, what is refused."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from vqcore_text import strings
from vqcore_text.strings import FOURM_METADATA, Box, Instance
from vqcore_text.wordpiece import WordPiece

from vqcore.errors import DataError

unit = st.floats(0, 1)
bins = st.integers(2, 1000)
labels = st.lists(st.sampled_from(["hot dog", "person", "cat", "a thing"]), min_size=1, max_size=2).map(
    " ".join
)


@st.composite
def boxes(draw):
    left, right = sorted((draw(unit), draw(unit)))
    top, bottom = sorted((draw(unit), draw(unit)))
    return Box(left, top, right, bottom, draw(labels))


instances = st.builds(
    Instance, labels, st.lists(st.none() | st.tuples(unit, unit), min_size=1, max_size=4).map(tuple)
)
levels = st.integers(0, 255)


@pytest.fixture(scope="module")
def tokenizer():
    made = WordPiece(WordPiece.Config(vocab_size=4500))
    made.train(["a thing point none"])
    return made


def test_closed_forms():
    dog = Box(0, 0.25, 0.5, 1, "hot dog")
    assert strings.boxes_to_text([dog, dog]) == " ".join(["v0=0 v1=250 v2=500 v3=999 hot dog"] * 2)
    assert strings.boxes_to_text([dog], bins=3) == "v0=0 v1=0 v2=1 v3=2 hot dog"
    assert (
        strings.keypoints_to_text([Instance("person", ((0, 1), None))])
        == "person point v0=0 v1=999 point none"
    )
    assert strings.palette_to_text([(1, 2, 3), (255, 0, 0)]) == "v1=2 v0=1 v0=2 v0=3 v0=255 v0=0 v0=0"
    assert strings.boxes_to_text([]) == strings.keypoints_to_text([]) == "none"
    assert strings.text_to_boxes("none") == strings.text_to_keypoints("none") == []


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("original_width", 1024, "v1=0 v0=32"),
        ("original_height", 1023, "v1=1 v0=31"),
        ("caption_n_words", 12, "v1=3 v0=12"),
        ("colorfulness", 150, "v1=9 v0=49"),
        ("colorfulness", 149.9, "v1=9 v0=48"),
        ("brightness", 0, "v1=10 v0=0"),
        ("occlusion_score", 0.125, "v1=18 v0=24"),
        ("watermark_score", 0.5, "v1=19 v0=1"),
        ("aesthetic_score", 4.4, "v1=20 v0=0"),
        ("aesthetic_score", 5, "v1=20 v0=1"),
        ("aesthetic_score", 9, "v1=20 v0=2"),
    ],
)
def test_metadata_in_closed_form(name, value, text):
    assert strings.metadata_to_text({name: value}) == text


@given(count=bins, data=st.data())
def test_a_number_is_exactly_that_of_its_coordinate(count, data):
    number = data.draw(st.integers(0, count - 1))
    assert strings.quantized(strings.coordinate(number, count), count) == number


@given(x=unit, y=unit, count=bins)
def test_the_nearest_bin_is_taken_and_order_is_kept(x, y, count):
    numbers = [strings.quantized(each, count) for each in (x, y)]
    assert (numbers[0] - numbers[1]) * (x - y) >= 0
    off = abs(Fraction(numbers[0], count - 1) - Fraction(x))
    assert off <= Fraction(1, 2 * (count - 1)) + Fraction(1, 10**12)


@examples(max_examples=60)
@given(drawn=st.lists(boxes(), max_size=4))
def test_boxes_both_ways_and_through_ids(tokenizer, drawn):
    text = strings.boxes_to_text(drawn)
    back = strings.text_to_boxes(text)
    assert strings.boxes_to_text(back) == text and [box.label for box in back] == [box.label for box in drawn]
    assert all(abs(a.left - b.left) <= 0.5 / 999 + 1e-9 for a, b in zip(drawn, back))
    assert tokenizer.decode(tokenizer.encode([text])) == [text]


@examples(max_examples=60)
@given(drawn=st.lists(instances, max_size=3))
def test_keypoints_both_ways_and_through_ids(tokenizer, drawn):
    text = strings.keypoints_to_text(drawn)
    back = strings.text_to_keypoints(text)
    assert strings.keypoints_to_text(back) == text and [len(one.points) for one in back] == [
        len(one.points) for one in drawn
    ]
    assert tokenizer.decode(tokenizer.encode([text])) == [text]


@examples(max_examples=60)
@given(drawn=st.lists(st.tuples(levels, levels, levels), min_size=1, max_size=7))
def test_palettes_both_ways(tokenizer, drawn):
    text = strings.palette_to_text(drawn)
    assert strings.text_to_palette(text) == drawn
    ids = tokenizer.encode([text])[0]
    assert len(ids) == 1 + 3 * len(drawn) and tokenizer.decode([ids]) == [text]


@given(data=st.data())
def test_metadata_both_ways(data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(FOURM_METADATA)), unique=True, min_size=1))
    order = list(FOURM_METADATA)
    text = " ".join(
        f"v1={order.index(n)} v0={data.draw(st.integers(0, FOURM_METADATA[n].count - 1))}" for n in chosen
    )
    values = strings.text_to_metadata(text)
    assert list(values) == chosen and strings.metadata_to_text(values) == text


@given(name=st.sampled_from(sorted(FOURM_METADATA)), value=st.floats(-1e6, 1e6))
def test_metadata_of_any_value_is_clipped_or_refused(name, value):
    bins = FOURM_METADATA[name]
    number = int(strings.metadata_to_text({name: value}, clip=True).split("v0=")[1])
    assert 0 <= number < bins.count
    try:
        strict = strings.metadata_to_text({name: value})
    except DataError:
        assert not bins.edges and not bins.low <= value < bins.high
    else:
        assert strict == strings.metadata_to_text({name: value}, clip=True)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: strings.quantized(1.0001), "a coordinate is 1.0001; coordinates lie from 0 to 1"),
        (lambda: strings.quantized(math.nan), "a coordinate is nan"),
        (lambda: strings.coordinate(1000), "has the number 1000; there are 1000 bins"),
        (lambda: strings.boxes_to_text([Box(0, 0, 1, 1.5, "cat")]), "bottom of the box 'cat' is 1.5"),
        (lambda: strings.boxes_to_text([Box(0.5, 0, 0.4, 1, "cat")]), "the box 'cat' ends before it begins"),
        (lambda: strings.boxes_to_text([Box(0, 0, 1, 1, "a v0=3")]), "'a v0=3' is no label"),
        (lambda: strings.boxes_to_text([Box(0, 0, 1, 1, " ")]), "' ' is no label"),
        (lambda: strings.text_to_boxes("v0=1 v1=2 v3=4 cat"), "word 3 is v3=4, not v2=..."),
        (lambda: strings.text_to_boxes("v0=1 v1=2 v2=3"), "word 4 is the end, not v3=..."),
        (lambda: strings.text_to_boxes("v0=1 v1=2 v2=3 v3=4 v0=1"), "there is no label at word 5"),
        (lambda: strings.text_to_boxes("v0=1 v1=2 v2=3 v3=1000 cat"), "has the number 1000"),
        (lambda: strings.text_to_boxes("v0=9 v1=2 v2=3 v3=4 cat"), "ends before it begins"),
        (lambda: strings.text_to_boxes(" "), "there are no words"),
        (lambda: strings.keypoints_to_text([Instance("cat", ())]), "'cat' has no points"),
        (lambda: strings.keypoints_to_text([Instance("cat", ((0, 2),))]), "point 0 of 'cat' is 2"),
        (lambda: strings.text_to_keypoints("cat"), "'cat' has no points"),
        (lambda: strings.palette_to_text([(0, 0, 256)]), r"\(0, 0, 256\) is no colour"),
        (lambda: strings.palette_to_text([(0, 0, 0.5)]), r"\(0, 0, 0.5\) is no colour"),
        (lambda: strings.palette_to_text([]), "a palette has 1 to 999 colours, not 0"),
        (lambda: strings.text_to_palette("v1=1 v0=0 v0=0 v0=0 v0=0"), "goes on after 1 colours"),
        (lambda: strings.text_to_palette("v1=1 v0=0 v0=0 v0=999"), "is no colour"),
        (lambda: strings.metadata_to_text({"brightnes": 1}), "Did you mean 'brightness'"),
        (lambda: strings.metadata_to_text({"brightness": 256}), "brightness is 256; it lies from 0 to 255"),
        (lambda: strings.metadata_to_text({"n_humans": 1000}), "n_humans is 1000; it lies from 0 to below 1000"),
        (lambda: strings.metadata_to_text({"entropy": math.nan}), "entropy is no number"),
        (lambda: strings.text_to_metadata("v1=21 v0=0"), "v1=21 is no name; there are 21"),
        (lambda: strings.text_to_metadata("v1=9 v0=50"), "colorfulness has bin 50; there are 50"),
        (lambda: strings.text_to_metadata("v1=9 v0=0 v1=9 v0=0"), "'colorfulness' is there twice"),
    ],
)  # fmt: skip
def test_what_is_refused(make, text):
    with pytest.raises(DataError, match=text):
        make()
