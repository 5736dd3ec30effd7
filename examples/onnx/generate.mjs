// Greedy generation with an exported folder on onnxruntime-node, token ids in and out.
//   npm install --ignore-scripts onnxruntime-node     (the install script would fetch CUDA libraries)
//   node generate.mjs FOLDER NEW_TOKENS ID ID ID ...
// Prints one JSON line: {"tokens": [...]}, and "outside" where a profile tells whether the prompt lies
// outside the model's domain. Text needs a tokenizer; tokenizer.json is in the folder.
import path from "node:path";
import { createRequire } from "node:module";
import { outside } from "./outside.mjs";

// From where it is called, not from where this file lies: that is where node_modules is.
const ort = createRequire(path.join(process.cwd(), "package.json"))("onnxruntime-node");

const [folder, newTokens, ...prompt] = process.argv.slice(2);
const session = await ort.InferenceSession.create(path.join(folder, "model.onnx"));

// The cache starts empty and grows: every layer has its own number of KV heads, in its own shape.
const cache = {};
for (const input of session.inputMetadata) {
  if (input.name.startsWith("past_key_values.")) {
    const [, heads, , width] = input.shape;
    // A float16 cache is fed back as it came; it is never looked into here.
    const empty = input.type === "float16" ? new Uint16Array(0) : new Float32Array(0);
    cache[input.name] = new ort.Tensor(input.type, empty, [1, heads, 0, width]);
  }
}

const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const argmax = (row) => row.reduce((best, value, i) => (value > row[best] ? i : best), 0);

let step = prompt.map(Number);
let length = 0;
const tokens = [];
while (tokens.length < Number(newTokens)) {
  const feeds = { ...cache, input_ids: int64(step) };
  length += step.length;
  feeds.attention_mask = int64(Array(length).fill(1));
  if (session.inputNames.includes("position_ids")) {
    feeds.position_ids = int64(step.map((_, i) => length - step.length + i));
  }
  const results = await session.run(feeds);
  for (const name of Object.keys(cache)) {
    cache[name] = results[name.replace("past_key_values", "present")];
  }
  const { data, dims } = results.logits;
  tokens.push(argmax(data.subarray(data.length - dims[2])));
  step = [tokens.at(-1)];
}
console.log(JSON.stringify({ tokens, outside: outside(folder, prompt.map(Number)) }));
