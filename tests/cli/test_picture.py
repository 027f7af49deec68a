from neurms.cli.picture import Curve, picture

FALL = [(10.0 * i, 5.0 - i) for i in range(5)]


def test_a_line_falls_from_the_upper_left_to_the_lower_right() -> None:
    rows = picture([Curve("one", FALL)], width=12, height=6).plain.splitlines()
    inside = [row.split("│")[1] for row in rows if "│" in row]
    places = [min(i for i, c in enumerate(row) if c != " ") for row in inside if row.strip()]
    assert places == sorted(places)
    assert rows[0].split()[0] == "4.00"
    assert rows[5].split()[0] == "1.00"
    assert "step 40" in rows[7]
    assert "one" in rows[-1]


def test_letters_where_there_is_no_unicode_and_names_for_all() -> None:
    flat = Curve("two", [(x, 2.0) for x, _ in FALL])
    shown = picture([Curve("one", FALL), flat, Curve("none", [])], letters=True).plain
    assert shown.isascii()
    assert "aaaa" in shown
    assert "bbbbbbbbbb" in shown
    assert "c none" in shown


def test_the_fall_at_the_start_does_not_flatten_the_rest() -> None:
    steep = Curve("steep", [(0.0, 1000.0), *[(10.0 * i, 3.0 - 0.1 * i) for i in range(5, 20)]])
    top = float(picture([steep]).plain.split()[0])
    assert 1.0 < top < 3.0


def test_nothing_to_draw_is_said() -> None:
    assert "no run stayed finite" in picture([Curve("one", [])]).plain
