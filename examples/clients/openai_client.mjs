// The openai client for JavaScript: npm install openai
//
//     node openai_client.mjs http://localhost:8000/v1 KEY ADAPTER PROMPT

import OpenAI from "openai";

const [baseURL, apiKey, model, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey });
const messages = [{ role: "user", content: prompt }];
const options = { model, max_tokens: 12, temperature: 0 };

const completion = await client.completions.create({ prompt, ...options });
const chat = await client.chat.completions.create({ messages, ...options });
let streamed = "";
for await (const chunk of await client.chat.completions.create({ messages, stream: true, ...options }))
  streamed += chunk.choices[0]?.delta.content ?? "";
let unknown = 200;
try {
  await client.completions.create({ ...options, model: "no-such-adapter", prompt });
} catch (error) {
  if (!(error instanceof OpenAI.NotFoundError)) throw error;
  unknown = error.status;
}
let models = 0;
for await (const _ of client.models.list()) models += 1;

const answers = { completion: completion.choices[0].text, chat: chat.choices[0].message.content };
console.log(JSON.stringify({ ...answers, streamed, unknown, models }));
