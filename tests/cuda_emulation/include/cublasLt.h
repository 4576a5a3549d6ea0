// The types of cublasLt.h that our header names; nothing of it is emulated.
#pragma once

using cublasLtHandle_t = void*;
using cublasLtMatmulDesc_t = void*;
using cublasLtMatrixLayout_t = void*;
struct cublasLtMatmulAlgo_t {};
