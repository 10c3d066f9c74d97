// What python.cpp needs of ops.cpp.
#pragma once

#include <string>

namespace lbg {

// Why torch.ops.lbg could not be registered from this library; empty if it was.
const std::string& registration_error();

}  // namespace lbg
