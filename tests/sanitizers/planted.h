// Lies told to the real kernels, one for each kind of mistake that a sanitizer must see.
#pragma once

// Returns whether there is a lie of this name.
extern "C" __attribute__((visibility("default"))) bool regfused_plant(const char* name);
