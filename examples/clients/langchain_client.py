"""LangChain: pip install langchain-openai

python langchain_client.py http://localhost:8000/v1 KEY ADAPTER PROMPT
"""

import json
import sys

import openai
from langchain_openai import ChatOpenAI, OpenAI

url, key, model, prompt = sys.argv[1:]
options = {"base_url": url, "api_key": key, "max_tokens": 12, "temperature": 0}

completion = OpenAI(model=model, **options).invoke(prompt)
chat = ChatOpenAI(model=model, **options)
streamed = "".join(str(chunk.content) for chunk in chat.stream(prompt))
try:
    OpenAI(model="no-such-adapter", **options).invoke(prompt)
    unknown = 200
except openai.NotFoundError as error:
    unknown = error.status_code

answers = {"completion": completion, "chat": chat.invoke(prompt).content}
print(json.dumps(answers | {"streamed": streamed, "unknown": unknown}))
