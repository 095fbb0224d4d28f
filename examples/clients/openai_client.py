"""The openai client for Python: pip install openai

    python openai_client.py http://localhost:8000/v1 KEY ADAPTER PROMPT

Any key does where the server asks for none.
"""

import json
import sys

import openai

url, key, model, prompt = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key=key)
messages = [{"role": "user", "content": prompt}]
options = {"max_tokens": 12, "temperature": 0}

completion = client.completions.create(model=model, prompt=prompt, **options)
chat = client.chat.completions.create(model=model, messages=messages, **options)
stream = client.chat.completions.create(model=model, messages=messages, stream=True, **options)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
try:
    client.completions.create(model="no-such-adapter", prompt=prompt)
    unknown = 200
except openai.NotFoundError as error:
    unknown = error.status_code

answers = {"completion": completion.choices[0].text, "chat": chat.choices[0].message.content}
answers |= {"streamed": streamed, "unknown": unknown}
print(json.dumps(answers | {"models": sum(1 for _ in client.models.list())}))
