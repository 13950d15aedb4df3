// The list of rules: what a new optimizer is added to.
#pragma once

#include <cstdint>
#include <string_view>

#include "adam_rule.h"
#include "sgd_rule.h"

namespace regfused {

enum class RuleId : uint8_t { sgd, adam };
constexpr int kRules = 2;

// Slots of a parameter, at most.
constexpr int kMostSlots = 3;

inline namespace REGFUSED_ISA {

// function.template operator()<Sgd>() and so on; for the host, which knows the rule at run time.
template <class Function>
__attribute__((always_inline)) inline auto by_rule(RuleId rule, const Function& function) {
  switch (rule) {
    case RuleId::adam: return function.template operator()<Adam>();
    default: return function.template operator()<Sgd>();
  }
}

// What the host has to know of a rule.
struct RuleInfo {
  const char* name;
  const OptionInfo* options;
  int option_count;
  const char* const* slots;
  int slot_count;
  bool counts_steps;
  const char* demand;  // what `allows` demands, for messages

  // Of a group's hyperparameters.
  unsigned (*slots_of)(const StepHyper&);
  double (*steady_gain)(const StepHyper&);
  bool (*allows)(const StepHyper&);
  StepTime (*at)(const StepHyper&, double t);
  StepLength (*length)(const StepHyper&, const StepTime&, unsigned slot_set);
  // The rule's hyperparameters with their defaults.
  void (*set_defaults)(StepHyper&);
};

template <class R>
constexpr RuleInfo info_of() {
  using Hyper = typename R::Hyper;
  static_assert(sizeof(R::kSlots) / sizeof(R::kSlots[0]) <= kMostSlots);
  return {R::kName,
          R::kOptions,
          int(sizeof(R::kOptions) / sizeof(R::kOptions[0])),
          R::kSlots,
          int(sizeof(R::kSlots) / sizeof(R::kSlots[0])),
          R::kCountsSteps,
          R::kDemand,
          [](const StepHyper& step) { return R::slots_of(step.own<Hyper>()); },
          [](const StepHyper& step) { return R::steady_gain(step.own<Hyper>()); },
          [](const StepHyper& step) { return R::allows(step, step.own<Hyper>()); },
          [](const StepHyper& step, double t) { return R::at(step.own<Hyper>(), t); },
          [](const StepHyper& step, const StepTime& time, unsigned slot_set) {
            return R::length(step.own<Hyper>(), time, slot_set);
          },
          [](StepHyper& step) { step.set_own(Hyper()); }};
}

inline const RuleInfo& info_of(RuleId rule) {
  static const RuleInfo rules[kRules] = {info_of<Sgd>(), info_of<Adam>()};
  return rules[static_cast<int>(rule)];
}

// -1: there is none of this name.
inline int rule_named(std::string_view name) {
  for (int rule = 0; rule < kRules; ++rule)
    if (name == info_of(static_cast<RuleId>(rule)).name) return rule;
  return -1;
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
