"""The reward function of the recipes, as an example for your own.

The function receives the keyword arguments that its parameters name, out of prompts, responses (text), terminated
(whether a stop token ended each response) and all columns of the prompts' file. It returns one number per response.
"""

import re

HAPPY = re.compile(
    r"""\b(
    beautiful | brave | bright | cake | cheerful | delicious | enjoyed | excited | friend | friends |
    fun | funny | glad | good | great | happily | happy | helped | hug | hugged | hugs | joy | kind |
    laughed | laughing | love | loved | lovely | nice | party | play | played | proud | safe | sang |
    shared | smile | smiled | smiling | sunny | sweet | thankful | together | warm | wonderful | yummy
    )\b""",
    re.VERBOSE,
)


def happy_story(responses: list[str], terminated: list[bool]) -> list[float]:
    """Score each story by a tenth of the number of different happy words, at most 1; a truncated story gets half.

    Repetitions do not count, so that repeating a word does not pay.

    Args:
        responses: The texts of the responses [B].
        terminated: Whether a stop token ended each response [B].

    Returns:
        The scores [B], from 0 to 1.

    >>> happy_story(["The dog was happy, happy and kind.", "A kind dog laughed and"], [True, False])
    [0.2, 0.1]
    """
    scores = []
    for response, ended in zip(responses, terminated, strict=True):
        different = set(HAPPY.findall(response.lower()))
        scores.append(min(len(different), 10) / 10 * (1.0 if ended else 0.5))
    return scores
