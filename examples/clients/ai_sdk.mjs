// Vercel's AI SDK: npm install ai @ai-sdk/openai-compatible
//
//     node ai_sdk.mjs http://localhost:8000/v1 KEY ADAPTER PROMPT

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";

const [baseURL, apiKey, model, prompt] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "vllm-jd", baseURL, apiKey });
const options = { prompt, maxOutputTokens: 12, temperature: 0 };

const chat = await generateText({ model: provider(model), ...options });
let streamed = "";
for await (const piece of streamText({ model: provider(model), ...options }).textStream)
  streamed += piece;
let unknown = 200;
try {
  await generateText({ model: provider("no-such-adapter"), ...options });
} catch (error) {
  if (!APICallError.isInstance(error)) throw error;
  unknown = error.statusCode;
}

console.log(JSON.stringify({ chat: chat.text, streamed, unknown }));
