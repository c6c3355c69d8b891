#include "result_memory.h"

#include <algorithm>
#include <mutex>

#include "huge_pages.h"

#if defined(__linux__) && defined(MADV_FREE)
#define KEEPS_RESULT_MEMORY 1

// Of PyTorch 2.11 and newer; elsewhere it is not there, and nothing is kept.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* deleter_context);
#endif

namespace metarec_fast::cpu {

#ifdef KEEPS_RESULT_MEMORY
namespace {

constexpr size_t kPage = size_t{1} << 12;
constexpr size_t kSmallest = size_t{1} << 10;  // bytes; below, the C library is quick
constexpr size_t kLarge = 2 * kHugePage;       // from here on in huge pages
constexpr size_t kStays = size_t{64} << 20;    // of what was in use last; the rest is free to take
constexpr size_t kMostKept = size_t{2} << 30;
constexpr size_t kMostBlocks = 16;

struct Block {
  void* data;
  size_t bytes;
  bool free_to_take = false;
};

// Nobody waits for the lock: whoever does not get it does without kept memory. So the child of a
// fork() that happened while another thread held it cannot hang.
class KeptBlocks {
 public:
  // At least `bytes`, and of whole pages at most a quarter more; of equals the one that was in use
  // last.
  Block take(size_t bytes) {
    const size_t page = bytes >= kLarge ? kHugePage : kPage;
    const size_t whole = (bytes + page - 1) / page * page;
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      Block* best = nullptr;
      for (Block* block = free_; block != free_ + count_; ++block)
        if (block->bytes >= whole && block->bytes <= whole + whole / 4 &&
            (best == nullptr || block->bytes <= best->bytes))
          best = block;
      if (best != nullptr) return remove(best);
    }
    void* data = std::aligned_alloc(page, whole);
    STD_TORCH_CHECK(data != nullptr, "out of memory: a result needs ", whole, " bytes");
    if (whole >= kLarge) madvise(data, whole, MADV_HUGEPAGE);
    return {data, whole};
  }

  void give_back(const Block& block) {
    if (block.bytes > kMostKept) return std::free(block.data);
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return std::free(block.data);
    while (count_ == kMostBlocks || kept_ + block.bytes > kMostKept)  // the longest unused first
      std::free(remove(free_).data);
    free_[count_++] = {block.data, block.bytes};
    kept_ += block.bytes;
    let_go();
  }

 private:
  // Marks what has not been in use for long. Marking a block in every call would make a processor
  // forget where pages are, on a virtual machine even all of them.
  void let_go() {
    size_t bytes = 0;
    for (size_t i = count_; i-- > 0;) {
      Block& block = free_[i];
      bytes += block.bytes;
      if (bytes <= kStays || block.bytes < kLarge || block.free_to_take) continue;
      madvise(block.data, block.bytes, MADV_FREE);
      block.free_to_take = true;
    }
  }

  Block remove(Block* place) {
    const Block block = *place;
    std::copy(place + 1, free_ + count_--, place);
    kept_ -= block.bytes;
    return block;
  }

  std::mutex mutex_;
  Block free_[kMostBlocks];
  size_t count_ = 0, kept_ = 0;  // blocks, and their bytes
};

// Never destroyed: tensors may outlive whatever is.
KeptBlocks& kept_blocks() {
  static KeptBlocks* blocks = new KeptBlocks;
  return *blocks;
}

void give_back(void*, void* context) {
  Block* block = static_cast<Block*>(context);
  kept_blocks().give_back(*block);
  delete block;
}

}  // namespace
#endif

Tensor empty_result(const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> sizes) {
#ifdef KEEPS_RESULT_MEMORY
  const TensorLayout layout(like, dtype, sizes);
  const size_t bytes = layout.numel * (dtype == ScalarType::Float ? 4 : 8);
  if (torch_from_blob != nullptr && bytes >= kSmallest) {
    Block* block = new Block(kept_blocks().take(bytes));
    AtenTensorHandle handle;
    const AOTITorchError error =
        torch_from_blob(block->data, layout.dim, sizes.begin(), layout.strides.data(),
                        /*storage_offset=*/0, layout.dtype, layout.device_type, layout.device_index,
                        &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, block);
    if (error != AOTI_TORCH_SUCCESS) give_back(nullptr, block);
    STABLE_TORCH_ERROR_CODE_CHECK(error);
    return Tensor(handle);
  }
#endif
  Tensor result = empty(like, dtype, sizes);
  prefer_huge_pages(result);
  return result;
}

}  // namespace metarec_fast::cpu
