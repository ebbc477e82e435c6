"""Stop strings end a text at the same place, however it is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv import ArgumentError
from paged_kv.text.stop_strings import StopStrings

TEXTS = st.text("ab\n", max_size=12)


@given(
    pieces=st.lists(TEXTS, max_size=8), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)
)
def test_the_text_is_cut_before_the_first_stop_string(pieces, stops):
    stopper, text = StopStrings(stops), "".join(pieces)
    shown = "".join(stopper.add(piece) for piece in pieces)
    places = {}  # how much of the text must have come, and where it is cut
    length = 0
    for piece in pieces:
        length += len(piece)
        found = [text[:length].find(stop) for stop in stops if stop in text[:length]]
        if found:
            places[length] = min(found)
            break
    if places:
        assert shown == text[: places[length]] and stopper.found in stops and stopper.finish() == ""
        assert stopper.add("more") == ""
    else:
        assert stopper.found is None and shown + stopper.finish() == text


@given(text=TEXTS, stop=st.text("ab\n", min_size=1, max_size=4))
def test_no_more_is_held_back_than_might_become_a_stop_string(text, stop):
    stopper = StopStrings([stop])
    shown = stopper.add(text)
    if stopper.found is None:
        held = text[len(shown) :]
        assert stop.startswith(held) and not any(
            stop.startswith(text[i:]) for i in range(len(shown)) if text[i:]
        )


@pytest.mark.parametrize("stops", ["text", [""], ["a", ""], [5], [b"a"]])
def test_what_is_no_list_of_texts_is_refused(stops):
    with pytest.raises(ArgumentError, match="stop is"):
        StopStrings(stops)
