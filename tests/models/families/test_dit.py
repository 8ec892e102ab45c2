"""DiT reads class labels: where words are asked for, it says so."""

import pytest

from dmd_dar import load_pipeline
from dmd_dar.errors import UserError
from dmd_dar.models.text import load_text_encoder
from tests.models.student_pipelines import student_of


@pytest.mark.stages("encode", "words", family="dit", refused="it reads class labels, and no prompts")
def test_there_are_no_words_for_it(tmp_path):
    student = str(student_of(tmp_path, "dit", "residual"))
    with pytest.raises(UserError, match="holds a DiTPipeline: prompts can be encoded for "):
        load_text_encoder(str(tmp_path / "dit"))
    with pytest.raises(UserError, match="label 'a cat': the student knows the classes 0 to 999"):
        load_pipeline(student)("a cat")
