// Merge every layer of a bf16 model from C++, in one call; each W stays the upper half of an fp32 master.
#include <flora_kernels.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

int main() {
    constexpr int64_t N = 32, K = 48, P = 8;
    std::vector<uint16_t> weights(2 * N * K, 0x3F80);  // bf16 ones
    std::vector<int16_t> low_bits(2 * N * K, 0);
    std::vector<float> A(P * K, 1e-4f), B(P * N, 1.0f), coef(P, 0.25f);

    std::vector<flora_merge_item> items;
    for (int64_t layer = 0; layer < 2; ++layer) {
        flora_merge_item item = FLORA_MERGE_ITEM_INIT;
        item.weight = {weights.data() + layer * N * K, N, K, K, 1, FLORA_BF16, 0};
        item.low_bits = {low_bits.data() + layer * N * K, N, K, K, 1, FLORA_INT16, 0};
        item.A = {A.data(), P, K, K, 1, FLORA_FP32, 0};
        item.B = {B.data(), P, N, N, 1, FLORA_FP32, 0};
        item.coef = {coef.data(), P, 1, FLORA_FP32, 0};
        items.push_back(item);
    }
    flora_merge_options options = FLORA_MERGE_OPTIONS_INIT;
    options.accumulate = FLORA_FP64;
    flora_exec exec = FLORA_EXEC_INIT;
    flora_status status = flora_merge_many_workspace(&exec, items.data(), 2, &options, &exec.workspace_bytes);
    exec.workspace = std::aligned_alloc(FLORA_WORKSPACE_ALIGNMENT, exec.workspace_bytes);
    if (status == FLORA_OK) status = flora_merge_many(&exec, items.data(), 2, &options);
    std::free(exec.workspace);
    if (status != FLORA_OK) return std::fprintf(stderr, "%s\n", flora_last_error()), 1;
    // 1 + 8 * 0.25 * 1e-4: bf16 alone would still say 1.
    uint32_t bits = (uint32_t{weights[0]} << 16) + static_cast<uint32_t>(low_bits[0]);
    float master;
    std::memcpy(&master, &bits, sizeof(master));
    std::printf("%.7f\n", master);
}
