// Which sources the compiled part was built from.
#pragma once

namespace regfused {

// What regfused/sources.py made of csrc/ at the time of the build; empty where another build than setup.py's compiled
// this.
const char* sources_digest();

}  // namespace regfused
