"""The address of a page: what is kept in it, what it brings back, and nonsense in it."""

import pytest
from streamlit.testing.v1 import AppTest

from tests.support.pages import literal


def one_page():
    """A page with a widget of each kind; ``owner`` plays the part of the run."""
    import streamlit as st

    from dashboard.address import begin, bind, finish, flag, keep, one_of, some_of, text, whole

    begin("page")
    owner = st.session_state.get("owner", "a")
    bind("k", "cutoff", st.session_state.get("best", 5), whole(1, 9), of=owner)
    st.slider("k", 1, 9, key="k")
    bind("m", "measure", "x", one_of(["x", "y"]))
    st.selectbox("m", ["x", "y"], key="m")
    bind("s", "compared", ["p"], some_of(["p", "q, r"]), always=True)
    st.multiselect("s", ["p", "q, r"], key="s")
    bind("t", "prompt", "", text())
    st.text_area("t", key="t")
    bind("f", "marked", True, flag())
    st.toggle("f", key="f")
    st.button("best", on_click=lambda: keep("cutoff", None, of=owner), key="b")
    finish()


def opened(**query):
    at = AppTest.from_function(one_page)
    for name, value in query.items():
        at.query_params[name] = value
    at.run()
    assert not at.exception
    return at


def test_choices_stand_in_the_address_and_defaults_do_not():
    at = opened()
    assert at.query_params == {"compared": "p"}
    at.slider(key="k").set_value(7)
    at.selectbox(key="m").select("y")
    at.text_area(key="t").set_value("two\nlines & more")
    at.multiselect(key="s").set_value(["p", "q, r"])
    at.toggle(key="f").set_value(False).run()
    wanted = {
        "cutoff": "7",
        "measure": "y",
        "compared": ["p", "q, r"],
        "prompt": "two\nlines & more",
        "marked": "no",
    }
    assert at.query_params == wanted
    again = opened(**wanted)
    assert (again.slider(key="k").value, again.selectbox(key="m").value) == (7, "y")
    assert again.multiselect(key="s").value == ["p", "q, r"]
    assert again.text_area(key="t").value == "two\nlines & more"
    assert again.toggle(key="f").value is False
    assert again.query_params == wanted
    again.slider(key="k").set_value(5).run()
    assert "cutoff" not in again.query_params


def test_an_empty_choice_is_one():
    at = opened()
    at.multiselect(key="s").set_value([]).run()
    assert opened(**at.query_params).multiselect(key="s").value == []


def test_long_texts_stay_out_of_the_address():
    at = opened()
    at.text_area(key="t").set_value("x" * 5000).run()
    assert "prompt" not in at.query_params
    assert at.text_area(key="t").value == "x" * 5000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cutoff", "99"),
        ("cutoff", "five"),
        ("cutoff", ["3", "4"]),
        ("cutoff", "nan"),
        ("cutoff", "9" * 5000),
        ("measure", "<script>"),
        ("compared", ["p", "gone"]),
        ("marked", "perhaps"),
    ],
)
def test_nonsense_in_an_address_is_one_line_and_the_default(name, text):
    at = opened(**{name: text})
    (said,) = at.warning
    assert literal(said.value).startswith(f"The address asks for {name}=")
    assert len(said.value) < 400
    assert "\n" not in said.value
    assert at.slider(key="k").value == 5
    assert at.query_params == {"compared": "p"}
    at.run()
    assert not at.warning


def test_a_default_is_followed_until_the_reader_chooses():
    at = opened()
    at.session_state["best"] = 6
    assert at.run().slider(key="k").value == 6
    at.slider(key="k").set_value(3).run()
    at.session_state["best"] = 4
    assert at.run().slider(key="k").value == 3
    at.button(key="b").click().run()
    assert at.slider(key="k").value == 4
    assert "cutoff" not in at.query_params


def test_every_owner_has_its_own_choice():
    at = opened(cutoff="7")
    at.session_state["owner"] = "b"
    assert at.run().slider(key="k").value == 5
    assert "cutoff" not in at.query_params
    at.slider(key="k").set_value(2).run()
    at.session_state["owner"] = "a"
    assert at.run().slider(key="k").value == 7
    assert at.query_params["cutoff"] == "7"


def test_a_click_sent_with_the_address_of_before_changes_no_choice():
    at = opened()
    at.slider(key="k").set_value(7).run()
    at.slider(key="k").set_value(8).run()
    at.query_params["cutoff"] = "7"  # the browser had not got the new one
    assert at.run().slider(key="k").value == 8
    assert at.query_params["cutoff"] == "8"


def test_back_in_the_browser_brings_the_choice_of_before(monkeypatch):
    monkeypatch.setattr("dashboard.address.LATE_SECONDS", 0.0)
    at = opened()
    at.slider(key="k").set_value(7).run()
    at.slider(key="k").set_value(8).run()
    at.query_params["cutoff"] = "7"
    assert at.run().slider(key="k").value == 7


def test_a_moved_widget_wins_over_an_address_that_the_browser_has_not_updated_yet():
    at = opened()
    at.slider(key="k").set_value(7).run()
    at.query_params.pop("cutoff")
    at.slider(key="k").set_value(8).run()
    assert at.slider(key="k").value == 8
    at.query_params["cutoff"] = "7"
    at.selectbox(key="m").select("y").run()
    assert at.slider(key="k").value == 8
    assert at.query_params["cutoff"] == "8"


def ends_early():
    import streamlit as st

    from dashboard.address import begin, bind, finish, keep, whole

    begin("page")
    if st.button("to nine", key="b"):
        keep("cutoff", 9)
        st.rerun()
    bind("k", "cutoff", 5, whole(1, 9))
    st.slider("k", 1, 9, key="k")
    finish()


def test_what_a_page_chooses_before_it_runs_anew_wins_over_the_address():
    at = AppTest.from_function(ends_early)
    at.query_params["cutoff"] = "7"
    assert at.run().slider(key="k").value == 7
    assert at.button(key="b").click().run().slider(key="k").value == 9
    assert at.query_params["cutoff"] == "9"


def linked():
    import streamlit as st

    from dashboard.address import begin, finish, kept, link, text

    begin("page")
    kept("run", "", text())
    finish()
    st.code(link("https://host/below/a%20path/cutoff?token=secret"))


def test_a_link_is_the_page_below_its_prefix_without_a_token():
    at = AppTest.from_function(linked)
    at.query_params["run"] = "a b&c"
    at.query_params["token"] = "secret"
    at.run()
    assert at.code[0].value == "https://host/below/a%20path/cutoff?run=a+b%26c"
