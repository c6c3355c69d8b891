// The activations of an MLP tower.
#pragma once

namespace metarec_fast {

enum class Activation { kRelu, kGelu };  // gelu: z Φ(z)

}  // namespace metarec_fast
