// Greedy generation with an exported folder (flavour portable) on OpenVINO.
//
//   generate FOLDER NEW_TOKENS ID ID ID ...    prints one JSON line: {"tokens": [...]}
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

namespace {

ov::Tensor integers(const std::vector<int64_t>& values) {
  ov::Tensor made(ov::element::i64, {1, values.size()});
  std::copy(values.begin(), values.end(), made.data<int64_t>());
  return made;
}

// The best of the last position's logits [1, positions, vocabulary].
int64_t best_of_last(const ov::Tensor& logits) {
  const auto shape = logits.get_shape();
  const float* last = logits.data<const float>() + (shape[1] - 1) * shape[2];
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

  ov::Core core;
  // Else a CPU with bf16 instructions computes in bf16.
  auto model = core.compile_model(file.string(), "CPU", ov::hint::inference_precision(ov::element::f32));
  auto request = model.create_infer_request();

  // An empty cache [1, KV heads, 0, head size] for every input that has one; layers may differ.
  std::map<std::string, ov::Tensor> cache;
  bool positions = false;
  for (const auto& input : model.inputs()) {
    const auto name = input.get_any_name();
    positions |= name == "position_ids";
    if (name.rfind("past_key_values.", 0) != 0) continue;
    const auto shape = input.get_partial_shape();
    const auto heads = static_cast<size_t>(shape[1].get_length());
    const auto size = static_cast<size_t>(shape[3].get_length());
    cache[name] = ov::Tensor(input.get_element_type(), {1, heads, 0, size});
  }

  std::vector<int64_t> tokens;
  int64_t length = 0;
  while (tokens.size() < wanted) {
    std::vector<int64_t> at;
    for (size_t i = 0; i < step.size(); i++) at.push_back(length++);
    request.set_tensor("input_ids", integers(step));
    request.set_tensor("attention_mask", integers(std::vector<int64_t>(length, 1)));
    if (positions) request.set_tensor("position_ids", integers(at));
    for (const auto& [name, tensor] : cache) request.set_tensor(name, tensor);
    request.infer();
    for (auto& [name, tensor] : cache) {
      const auto given = request.get_tensor("present" + name.substr(std::string("past_key_values").size()));
      tensor = ov::Tensor(given.get_element_type(), given.get_shape());
      given.copy_to(tensor);
    }
    tokens.push_back(best_of_last(request.get_tensor("logits")));
    step = {tokens.back()};
  }

  std::cout << "{\"tokens\": [";
  for (size_t i = 0; i < tokens.size(); i++) std::cout << (i ? ", " : "") << tokens[i];
  std::cout << "]}\n";
}
