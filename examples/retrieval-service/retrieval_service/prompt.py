"""From a natural question to the tail of a prompt."""

from .search import names

# As many tokens as an answer of the demo's models may have: two names and what they keep.
ANSWER_TOKENS = 16


class QuestionError(Exception):
    """The question cannot be asked as it stands; the message says what to change."""


# --------------------------------------------------------------------------------------------------------------------
# THE PROMPT TEMPLATE. The one place that knows what the model was taught. The tiny models of this repository know a
# single question, about one name or two; for an instruction-tuned model this function would return
# f"\n\nAnswer from the reports above.\nQuestion: {question}\nAnswer:" and refuse nothing but an empty question.
#
# What stands before the reports (the prefix) is the gateway's default, and a report is a chunk as it is: text that a
# template put around reports would have to be the same in every prompt, or their KV would never be found again.
# --------------------------------------------------------------------------------------------------------------------
def prompt_template(question: str) -> str:
    """The prompt's tail for a question in natural language."""
    asked = names(question)
    match asked:
        case [name]:
            return f"\nQuestion: what does {name} keep?\nAnswer: {name}'s"
        case [first, second]:
            return f"\nQuestion: what do {first} and {second} keep?\nAnswer: {first}'s"
        case []:
            why = "names nobody; ask about one or two capitalised names, e.g. what does Casrin keep?"
        case _:
            why = f"names {len(asked)} ({', '.join(asked)}); the demo's models were taught two at most"
    raise QuestionError(f"question: {why}")
