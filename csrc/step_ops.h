// The dispatcher's door to the step: torch.ops.regfused.sgd_, adam_ ...
#pragma once

#include <string>

#include "rule/rules.h"

namespace regfused {

// The schema of a rule's operator, or of its overload for several groups, made of the tables of options and slots.
std::string step_schema(RuleId rule, bool has_groups);

}  // namespace regfused
