"""Reward functions of the recipes, and a pattern for your own.

A function gets, by keyword, whichever it names of: prompts, responses (text), terminated (the response ended by
itself), and any column of the prompts' file; it returns one number a response.
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
    """Different happy words in a story (10 at most count), in tenths; half of it if the story does not end by itself.

    Only *different* words count, so that repeating one does not pay.
    """
    scores = []
    for response, ended in zip(responses, terminated, strict=True):
        different = set(HAPPY.findall(response.lower()))
        scores.append(min(len(different), 10) / 10 * (1.0 if ended else 0.5))
    return scores
