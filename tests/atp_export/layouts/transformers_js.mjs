// node transformers_js.mjs FOLDER NEW TEXT ...: transformers.js's ids of texts and its greedy tokens,
// as a line of JSON: [{ids, tokens}]. OPTIONS: those of from_pretrained, as JSON.
import path from "node:path";
import { createRequire } from "node:module";

const require = createRequire(path.join(process.cwd(), "package.json"));
const { AutoModelForCausalLM, AutoTokenizer, env } = require("@huggingface/transformers");
const [folder, count, ...texts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(
  name, JSON.parse(process.env.OPTIONS ?? "{}"),
);
const answers = [];
for (const text of texts) {
  const inputs = tokenizer(text);
  const out = await model.generate({
    ...inputs, max_new_tokens: +count, min_new_tokens: +count, do_sample: false,
  });
  const ids = Array.from(inputs.input_ids.data, Number);
  answers.push({ ids, tokens: Array.from(out.data, Number).slice(ids.length) });
}
console.log(JSON.stringify(answers));
