"""A text that is run through the model now; only where the server has one."""

from fastapi import Response

from actstore.query.service.models import PromptModel, PromptRequest
from actstore.query.service.problems import public_text
from actstore.query.service.prompting import Turns, answer_prompt
from actstore.query.service.resources import Asked, new_router, resource
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["router"]

router = new_router("prompt")


@resource(router, "/prompt", PromptModel, tagged=False, method="POST")
def prompt(ask: Asked, body: PromptRequest) -> Response:
    """The strongest nodes of a text, attributions, and what nodes write and read."""
    longest = ask.settings.max_text_characters
    if len(body.text) > longest:
        raise InvalidInput(
            f"The text has {len(body.text):,} characters; this server runs {longest:,} at most.",
            kind=ErrorKind.TOO_LARGE,
        )
    state = ask.request.app.state
    turns: Turns = state.prompt_turns
    with turns.take():
        found = answer_prompt(state.prompt, body, ask.store.texts, ask.settings.max_json_values)
    found["notes"] = [public_text(note, state.roots) for note in found["notes"]]
    return ask.object(found)
