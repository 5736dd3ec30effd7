// Greedy generation with an exported folder on ONNX Runtime. Neither built nor run by us: no package
// of the usual indexes brings ONNX Runtime's headers. The OpenVINO example beside it was run.
//
//   generate FOLDER NEW_TOKENS ID ID ID ...    prints one JSON line: {"tokens": [...]}
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace {

const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

// A view of the values: they have to outlive it.
Ort::Value integers(std::vector<int64_t>& values) {
  const std::vector<int64_t> shape{1, static_cast<int64_t>(values.size())};
  return Ort::Value::CreateTensor<int64_t>(memory, values.data(), values.size(), shape.data(), 2);
}

// The best of the last position's logits [1, positions, vocabulary].
int64_t best_of_last(const Ort::Value& logits) {
  const auto shape = logits.GetTensorTypeAndShapeInfo().GetShape();
  const float* last = logits.GetTensorData<float>() + (shape[1] - 1) * shape[2];
  return std::max_element(last, last + shape[2]) - last;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: generate FOLDER NEW_TOKENS ID ID ID ...\n";
    return 2;
  }
  const auto file = std::filesystem::path(arguments[1]) / "model.onnx";
  const size_t wanted = std::stoul(arguments[2]);
  std::vector<int64_t> step;
  for (int i = 3; i < count; i++) step.push_back(std::stoll(arguments[i]));

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "generate");
  Ort::SessionOptions options;
  Ort::Session session(env, file.c_str(), options);
  Ort::AllocatorWithDefaultOptions allocator;

  // Of the cache an empty [1, KV heads, 0, head size] an input; layers may differ.
  std::vector<std::string> past, present;
  std::vector<Ort::Value> cache;
  bool positions = false;
  for (size_t i = 0; i < session.GetInputCount(); i++) {
    const std::string name = session.GetInputNameAllocated(i, allocator).get();
    positions |= name == "position_ids";
    if (name.rfind("past_key_values.", 0) != 0) continue;
    const auto type = session.GetInputTypeInfo(i);
    const auto info = type.GetTensorTypeAndShapeInfo();
    const auto shape = info.GetShape();
    const std::vector<int64_t> empty{1, shape[1], 0, shape[3]};
    past.push_back(name);
    present.push_back("present" + name.substr(std::string("past_key_values").size()));
    cache.push_back(Ort::Value::CreateTensor(allocator, empty.data(), empty.size(), info.GetElementType()));
  }
  std::vector<const char*> outputs{"logits"};
  for (const auto& name : present) outputs.push_back(name.c_str());

  std::vector<int64_t> tokens;
  int64_t length = 0;
  while (tokens.size() < wanted) {
    std::vector<int64_t> at;
    for (size_t i = 0; i < step.size(); i++) at.push_back(length++);
    std::vector<int64_t> mask(length, 1);
    std::vector<const char*> names{"input_ids", "attention_mask"};
    std::vector<Ort::Value> fed;
    fed.push_back(integers(step));
    fed.push_back(integers(mask));
    if (positions) {
      names.push_back("position_ids");
      fed.push_back(integers(at));
    }
    for (size_t i = 0; i < past.size(); i++) {
      names.push_back(past[i].c_str());
      fed.push_back(std::move(cache[i]));
    }
    auto made = session.Run(Ort::RunOptions{}, names.data(), fed.data(), fed.size(), outputs.data(), outputs.size());
    for (size_t i = 0; i < past.size(); i++) cache[i] = std::move(made[i + 1]);
    tokens.push_back(best_of_last(made[0]));
    step = {tokens.back()};
  }

  std::cout << "{\"tokens\": [";
  for (size_t i = 0; i < tokens.size(); i++) std::cout << (i ? ", " : "") << tokens[i];
  std::cout << "]}\n";
}
