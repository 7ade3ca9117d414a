#include "plan.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "linear.h"
#include "parallel.h"
#include "shape.h"

namespace {

using namespace nybble;

struct Choice {
  int dtype;
  int64_t least, most;
  LinearCall call{};
  bool serves(int x_dtype, int64_t rows) const {
    return dtype == x_dtype && least <= std::max<int64_t>(rows, 1) && (!most || rows <= most);
  }
};

// The CPU's features; the registers of AMX are asked for where a plan wants them.
const std::vector<std::string>& features(bool tiles) {
  static const std::vector<std::string> without = detect_cpu(false).features;
  if (!tiles) return without;
  static const std::vector<std::string> with = detect_cpu(true).features;
  return with;
}

bool can_run(const std::string& needs) {
  if (needs == "-") return true;
  const std::vector<std::string>& has = features(needs.find("amx_tile") != std::string::npos);
  std::istringstream names(needs);
  for (std::string name; std::getline(names, name, ',');)
    if (std::find(has.begin(), has.end(), name) == has.end()) return false;
  return true;
}

const KernelEntry* kernel_of(const std::string& name) { return name == "-" ? nullptr : &find_kernel(name); }

// False where the CPU lacks what the choice needs.
bool read_choice(std::istringstream& line, Choice& choice) {
  std::string needs, linear, prepare, expand, few;
  ShapeWords w;
  LinearCall& call = choice.call;
  line >> choice.dtype >> choice.least >> choice.most >> needs >> linear >> prepare >> expand >> few >>
      call.static_activations >> call.act_steps >> w.bits >> w.n >> w.k >> w.group_size >> w.symmetric >> w.layout >>
      w.block_n >> w.block_k >> w.ordered >> w.group_scale >> w.minimum >> w.book >> w.levels;
  if (!line) refuse("plan: cannot read a line of it: " + line.str());
  if (!can_run(needs)) return false;
  call.kernel = kernel_of(linear);
  call.prepare = kernel_of(prepare);
  call.expand = kernel_of(expand);
  call.few = kernel_of(few);
  if (!call.kernel || !call.prepare) refuse("plan: a choice without kernels: " + line.str());
  call.shape = shape_of(w);
  return true;
}

void write(const char* message, char* error, size_t bytes) {
  if (bytes) std::snprintf(error, bytes, "%s", message);
}

}  // namespace

struct NybblePlan {
  std::vector<Choice> choices;
};

extern "C" NybblePlan* nybble_plan_make(const char* text, size_t bytes, char* error, size_t error_bytes) try {
  std::istringstream lines(std::string(text, bytes));
  std::string line;
  if (!std::getline(lines, line) || line != "nybble-plan 1") refuse("plan: must begin with \"nybble-plan 1\"");
  static const int watching = watch_forks();
  if (watching) throw std::runtime_error("cannot watch for forks");
  NybblePlan plan;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    Choice choice;
    if (read_choice(words, choice)) plan.choices.push_back(choice);
  }
  if (plan.choices.empty()) refuse("plan: this CPU has the instructions of none of its kernels");
  for (const Choice& choice : plan.choices)
    if (choice.call.shape.n != plan.choices[0].call.shape.n || choice.call.shape.k != plan.choices[0].call.shape.k)
      refuse("plan: its choices have different shapes");
  return new NybblePlan(plan);
} catch (const std::exception& e) {
  write(e.what(), error, error_bytes);
  return nullptr;
}

extern "C" int64_t nybble_plan_inputs(const NybblePlan* plan) { return plan->choices[0].call.shape.k; }
extern "C" int64_t nybble_plan_outputs(const NybblePlan* plan) { return plan->choices[0].call.shape.n; }

extern "C" int nybble_plan_run(const NybblePlan* plan, const NybbleProduct* product, int threads, char* error,
                               size_t error_bytes) try {
  const auto found = std::find_if(plan->choices.begin(), plan->choices.end(),
                                  [&](const Choice& one) { return one.serves(product->dtype, product->rows); });
  if (found == plan->choices.end())
    refuse("plan: has no kernel for " + std::to_string(product->rows) + " rows of dtype " +
           std::to_string(product->dtype));
  const auto span = [](const NybbleMemory& m) { return Span{reinterpret_cast<uintptr_t>(m.data), m.bytes}; };
  LinearCall call = found->call;
  call.x = span(product->x);
  call.packed = span(product->packed);
  call.bias = span(product->bias);
  call.y = span(product->y);
  call.rows = product->rows;
  call.stride = product->stride;
  call.x_dtype = call.y_dtype = product->dtype;
  call.bias_dtype = product->bias_dtype;
  run_linear(call, threads);
  return 1;
} catch (const std::exception& e) {
  write(e.what(), error, error_bytes);
  return 0;
}
