// The kernels of an MLP tower, for tables of float32.
#include "tower.cuh"

namespace metarec_fast::cuda {

METAREC_TOWER(float);

}  // namespace metarec_fast::cuda
