// The kernels of an MLP tower, for tables of float64.
#include "tower.cuh"

namespace metarec_fast::cuda {

METAREC_TOWER(double);

}  // namespace metarec_fast::cuda
