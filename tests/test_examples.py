"""The examples do what they say."""

from nvf.examples import upstream


def test_an_encoder_learns_through_the_soft_answer_alone() -> None:
    shares = upstream.main(steps=300)
    assert shares["hard"] < 0.02
    assert shares["soft"] > 0.5
