"""LiteLLM: pip install 'litellm!=1.107.0'

    python litellm_client.py http://localhost:8000/v1 KEY ADAPTER PROMPT

An adapter is the model `hosted_vllm/ADAPTER`.
"""

import json
import sys

import litellm

url, key, model, prompt = sys.argv[1:]
messages = [{"role": "user", "content": prompt}]
options = {"api_base": url, "api_key": key, "max_tokens": 12, "temperature": 0}
name = f"hosted_vllm/{model}"

completion = litellm.text_completion(model=name, prompt=prompt, **options)
chat = litellm.completion(model=name, messages=messages, **options)
stream = litellm.completion(model=name, messages=messages, stream=True, **options)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
try:
    litellm.completion(model="hosted_vllm/no-such-adapter", messages=messages, **options)
    unknown = 200
except litellm.NotFoundError as error:
    unknown = error.status_code

answers = {"completion": completion.choices[0].text, "chat": chat.choices[0].message.content}
print(json.dumps(answers | {"streamed": streamed, "unknown": unknown}))
