// How a kernel is called past the dispatcher: its arguments one by one, in the operator's order.
// This is all that kernels, which know nothing of Python, and _calls, which knows nothing of
// torch's C++, have in common.
#pragma once

#include <cstdint>

namespace metarec_fast {

struct DirectArgument {
  enum class Kind : int64_t { kNone, kTensor, kInteger, kReal, kTruth, kText };
  Kind kind;
  union {
    void* tensor;  // an AtenTensorHandle
    int64_t integer;
    double real;
    bool truth;
    const char* text;
  };
};

constexpr int64_t kMostArguments = 48, kMostResults = 16;

// Takes over the tensors that it is given, and gives away as many results as it says, nullptr for
// one that is not there. Says −1 where the operator would raise an error, and where it has to be
// called: for a tensor that is not simply numbers in memory.
using DirectKernel = int64_t (*)(const DirectArgument* arguments, int64_t count, void** results);

}  // namespace metarec_fast
