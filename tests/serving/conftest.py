"""What the tests of the server share. Each module has its own `playground`."""

import openai
import pytest

from gpt_arc.serving.server import HOST
from served import TOKEN


@pytest.fixture(scope="module")
def client(playground):
    url = f"http://{HOST}:{playground.port}/v1"
    with openai.OpenAI(base_url=url, api_key=TOKEN, max_retries=0, timeout=30) as client:
        yield client
