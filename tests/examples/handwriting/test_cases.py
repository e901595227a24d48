"""The prompts of the evaluation."""

from examples.handwriting import words
from examples.handwriting.cases import unseen_cases


def test_unseen_cases():
    cases = {str(c.prompt): c for c in unseen_cases()}
    assert cases["Count from one to three."].expected == ("one", 1, "two", 2, "three", 3)
    assert cases["Write two plus five."].expected == (2, "plus", 5, "equals", 7)
    following = [c for c in unseen_cases(2) if c.kind == "next"]
    assert len(following) == 18 and following[0].expected == ("one", 1)
    assert following[0].prompt.images[0].size == (16, 16) and following[0].prompt.text == words.NEXT
