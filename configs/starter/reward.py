"""The reward: what the model shall learn."""

GOOD = {"delicious", "excellent", "fresh", "friendly", "lovely", "perfect", "tasty", "warm"}


def reward(responses: list[str]) -> list[float]:
    """Return a number for each response: here the different words of praise in it, up to four, in quarters.

    A reward function receives by name what its parameters ask for: prompts, responses (texts), terminated (whether a
    stop token ended the response), and any column of prompts.jsonl.
    """
    return [min(4, len(GOOD & set(response.split()))) / 4 for response in responses]
