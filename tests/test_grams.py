"""Copies from the text: where they begin, how they go on behind a change, and when they end."""

from headwise.drafting import News, Reading
from headwise.grams import Copies, Grams

SOURCE = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]
READ = Reading({}, {}, 1)


def passes(copies: Copies, answer: list[int]) -> list[tuple[str, int]]:
    """Who drafted and how many tokens were accepted, pass by pass, while a row that copies writes the answer."""
    said, written = [], 0
    while written < len(answer):
        draft = copies.propose({0: 99})[0]
        good = 0
        while good < len(draft.tokens) and answer[written : written + good + 1] == draft.tokens[: good + 1]:
            good += 1
        new = answer[written : written + good + 1]
        said.append((draft.source if draft.tokens else "", min(good, len(new) - 1)))
        copies.accept({0: News(new)}, READ)
        written += len(new)
    return said


def begun(near: int) -> Copies:
    copies = Copies((3,), 24, "copyspec", near=near)
    copies.begin(None, [[*SOURCE, 1, 10, 11, 12]], False)
    return copies


def test_a_changed_token_costs_one_pass_where_the_paper_pays_three() -> None:
    answer = [13, 14, 90, 16, 17, 18, 19, 20, 21]
    assert passes(begun(8), answer) == [("copyspec", 2), ("", 0), ("copyspec, taken up", 4)]
    assert passes(begun(0), answer) == [("copyspec", 2), ("", 0), ("", 0), ("", 0), ("copyspec", 2)]


def test_left_out_and_added_tokens_are_followed_too() -> None:
    assert passes(begun(8), [13, 15, 16, 17, 18])[1:] == [("copyspec, taken up", 2)]
    assert passes(begun(8), [13, 90, 14, 15, 16])[1:] == [("", 0), ("copyspec, taken up", 1)]


def test_a_copy_that_is_taken_up_in_vain_has_ended() -> None:
    copies = begun(8)
    found = passes(copies, [13, 90, 16, 91, 92, 16, 93])
    assert ("copyspec, taken up", 0) in found
    assert [source for source, _ in found].count("copyspec, taken up") == 1 and 0 not in copies.copying


def test_the_nearest_twin_ahead_comes_before_one_behind() -> None:
    text = Grams((3,), 100)
    text.add([5, 6, 7, 5, 8, 5, 9, 5])
    assert text.beside(4, 4) == 6 and text.beside(4, 1) is None
    assert text.beside(7, 4) == 6 and text.beside(1, 1) is None


def test_rows_of_a_batch_go_on_by_themselves() -> None:
    copies = Copies((3,), 24, "copyspec", near=8)
    copies.begin(None, [[*SOURCE, 1, 10, 11, 12]] * 2, False)
    copies.propose({0: 99, 1: 99})
    copies.accept({0: News([13, 14, 90]), 1: News([77])}, READ)
    assert copies.copying == {0: 5, 1: 3}


def test_a_batch_shares_what_may_be_drafted() -> None:
    for rows, most in ((1, 12), (2, 12), (3, 8), (4, 6), (9, 4)):
        copies = Copies((3,), 24, "copyspec")
        copies.begin(None, [[*SOURCE, 10, 11, 12]] * rows, False)
        drafts = copies.propose(dict.fromkeys(range(rows), 99))
        assert [len(one.tokens) for one in drafts.values()] == [most] * rows
    short = Copies((3,), 2, "copyspec")
    short.begin(None, [[*SOURCE, 10, 11, 12]] * 3, False)
    assert [len(one.tokens) for one in short.propose({0: 9, 1: 9, 2: 9}).values()] == [2, 2, 2]
