"""The examples do what they say, and so does the code in the docs."""

import re
from pathlib import Path
from typing import Any

from nvf.examples import upstream

DOCS = Path(__file__).parents[2] / "docs"


def test_an_encoder_learns_through_the_soft_answer_alone() -> None:
    shares = upstream.main(steps=300)
    assert shares["hard"] < 0.02
    assert shares["soft"] > 0.5


def test_the_layer_in_the_docs_is_what_it_says() -> None:
    code = re.findall(r"```python\n(.*?)```", (DOCS / "differentiability.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    found = names["found"]
    assert found.log_probs.shape == (2, 7, 1000)
    assert found.answer.shape == (2, 7, 64)
    assert found.candidates.shape == found.scores.shape == (2, 7, 5)
    assert found.answer.requires_grad
