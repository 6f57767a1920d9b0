"""What the page says by itself: its disclaimer, its example questions, and the sentences for what cannot be done."""

from __future__ import annotations

from chat.disclaimer import FULL_DISCLAIMER

TITLE = "medcot"

# The terminal's last sentence is not true of a page that others may open.
PAGE_DISCLAIMER = FULL_DISCLAIMER.replace(
    "What you write stays on this computer.",
    "What you write goes to the computer that serves this page and no further; "
    "when the page is closed it is forgotten, within two hours.",
)

EXAMPLES = (
    "A 54-year-old man wakes with a hot, swollen, very painful big toe. What is likely, and how is it confirmed?",
    "Why does metformin alone seldom cause low blood sugar?",
    "How does a blood count tell iron deficiency from thalassemia trait?",
    "What should I ask my doctor before I start a blood thinner?",
    "Which vaccines does a healthy adult of 65 need, and why?",
)

QUESTION_HINT = "Enter sends, Shift+Enter begins a new line."
SYSTEM_PROMPT = "The model is told this before every conversation"
CLEARED = "A new conversation."
NOTHING_ASKED = "Write a question first."
STILL_ANSWERING = "The last question is still being answered: wait, or press Stop."
NOTHING_TO_RETRY = "There is no question yet to ask again."


def waiting(place: int) -> str:
    """``place`` questions come before."""
    return f"Waiting: {'one question is' if place == 1 else f'{place} questions are'} before yours."
