/* The part of onnxruntime's C API a custom operator needs, declared here because no package carries its headers.
 *
 * Source: onnxruntime_c_api.h of microsoft/onnxruntime (MIT). OrtApi is a table of function pointers that only ever
 * grows at its end, so a slot keeps its number in every later release; the numbers below are those of that header.
 * `GetApi(JPQ_ORT_API)` returns NULL when the library is older than the version asked for.
 */
#ifndef JPQ_ORT_API_H
#define JPQ_ORT_API_H

#include <stddef.h>
#include <stdint.h>

#define JPQ_ORT_API 18 /* onnxruntime 1.18: the youngest slot used here is KernelContext_ParallelFor, of 1.17 */

#if defined(_WIN32) && !defined(_WIN64)
#define ORT_CALL __stdcall
#else
#define ORT_CALL
#endif

typedef struct OrtStatus OrtStatus; /* NULL is success */
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorInfo OrtTensorInfo;
typedef struct OrtCustomOp OrtCustomOp;

typedef void(ORT_CALL *OrtFunction)(void);

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };                                              /* OrtErrorCode */
enum { ORT_ANY = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT64 = 7, ORT_BOOL = 9, ORT_FLOAT16 = 10 }; /* element types */
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1, ORT_VARIADIC = 2 };                                /* inputs, outputs */

/* Slots of the table. */
enum {
  SLOT_CreateStatus = 0,
  SLOT_CreateCustomOpDomain = 26,
  SLOT_CustomOpDomain_Add = 27,
  SLOT_AddCustomOpDomain = 28,
  SLOT_GetTensorMutableData = 51,
  SLOT_GetTensorElementType = 60,
  SLOT_GetDimensionsCount = 61,
  SLOT_GetDimensions = 62,
  SLOT_GetTensorShapeElementCount = 64,
  SLOT_GetTensorTypeAndShape = 65,
  SLOT_KernelInfoGetAttribute_float = 85,
  SLOT_KernelInfoGetAttribute_int64 = 86,
  SLOT_KernelContext_GetInputCount = 88,
  SLOT_KernelContext_GetInput = 90,
  SLOT_KernelContext_GetOutput = 91,
  SLOT_ReleaseStatus = 93,
  SLOT_ReleaseTensorTypeAndShapeInfo = 99,
  SLOT_KernelContext_GetGPUComputeStream = 193,
  SLOT_HasSessionConfigEntry = 237,
  SLOT_GetSessionConfigEntry = 238,
  SLOT_KernelInfoGetConstantInput_tensor = 249,
  SLOT_KernelContext_ParallelFor = 274,
  SLOTS = 278,
};

typedef struct OrtApi {
  OrtFunction slots[SLOTS];
} OrtApi;

typedef struct OrtApiBase {
  const OrtApi *(ORT_CALL *GetApi)(uint32_t version);
  const char *(ORT_CALL *GetVersionString)(void);
} OrtApiBase;

/* What the slots hold. */
typedef OrtStatus *(ORT_CALL *CreateStatus_t)(int code, const char *message);
typedef OrtStatus *(ORT_CALL *CreateCustomOpDomain_t)(const char *domain, OrtCustomOpDomain **out);
typedef OrtStatus *(ORT_CALL *CustomOpDomain_Add_t)(OrtCustomOpDomain *domain, const OrtCustomOp *op);
typedef OrtStatus *(ORT_CALL *AddCustomOpDomain_t)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
typedef OrtStatus *(ORT_CALL *GetTensorMutableData_t)(OrtValue *value, void **out);
typedef OrtStatus *(ORT_CALL *GetTensorElementType_t)(const OrtTensorInfo *info, int *out);
typedef OrtStatus *(ORT_CALL *GetDimensionsCount_t)(const OrtTensorInfo *info, size_t *out);
typedef OrtStatus *(ORT_CALL *GetDimensions_t)(const OrtTensorInfo *info, int64_t *dims, size_t count);
typedef OrtStatus *(ORT_CALL *GetTensorShapeElementCount_t)(const OrtTensorInfo *info, size_t *out);
typedef OrtStatus *(ORT_CALL *GetTensorTypeAndShape_t)(const OrtValue *value, OrtTensorInfo **out);
typedef OrtStatus *(ORT_CALL *KernelInfoGetAttribute_float_t)(const OrtKernelInfo *info, const char *name, float *out);
typedef OrtStatus *(ORT_CALL *KernelInfoGetAttribute_int64_t)(const OrtKernelInfo *info, const char *name, int64_t *out);
typedef OrtStatus *(ORT_CALL *KernelInfoGetConstantInput_tensor_t)(const OrtKernelInfo *info, size_t i, int *constant,
                                                                    const OrtValue **out);
typedef OrtStatus *(ORT_CALL *KernelContext_GetInputCount_t)(const OrtKernelContext *context, size_t *out);
typedef OrtStatus *(ORT_CALL *KernelContext_GetInput_t)(const OrtKernelContext *context, size_t i, const OrtValue **out);
typedef OrtStatus *(ORT_CALL *KernelContext_GetOutput_t)(OrtKernelContext *context, size_t i, const int64_t *dims,
                                                         size_t count, OrtValue **out);
typedef void(ORT_CALL *ReleaseStatus_t)(OrtStatus *status);
typedef void(ORT_CALL *ReleaseTensorTypeAndShapeInfo_t)(OrtTensorInfo *info);
typedef OrtStatus *(ORT_CALL *HasSessionConfigEntry_t)(const OrtSessionOptions *options, const char *key, int *out);
typedef OrtStatus *(ORT_CALL *GetSessionConfigEntry_t)(const OrtSessionOptions *options, const char *key, char *out,
                                                       size_t *size);
typedef OrtStatus *(ORT_CALL *KernelContext_GetGPUComputeStream_t)(const OrtKernelContext *context, void **out);
typedef OrtStatus *(ORT_CALL *KernelContext_ParallelFor_t)(const OrtKernelContext *context,
                                                           void (*task)(void *data, size_t i), size_t total,
                                                           size_t batches, void *data);

/* ORT(api, GetDimensions)(info, dims, count) */
#define ORT(api, name) ((name##_t)(api)->slots[SLOT_##name])

/* An operator as onnxruntime sees it, all fields up to version 18. */
struct OrtCustomOp {
  uint32_t version;
  void *(ORT_CALL *CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
  const char *(ORT_CALL *GetName)(const OrtCustomOp *op);
  const char *(ORT_CALL *GetExecutionProviderType)(const OrtCustomOp *op);
  int(ORT_CALL *GetInputType)(const OrtCustomOp *op, size_t i);
  size_t(ORT_CALL *GetInputTypeCount)(const OrtCustomOp *op);
  int(ORT_CALL *GetOutputType)(const OrtCustomOp *op, size_t i);
  size_t(ORT_CALL *GetOutputTypeCount)(const OrtCustomOp *op);
  void(ORT_CALL *KernelCompute)(void *kernel, OrtKernelContext *context);
  void(ORT_CALL *KernelDestroy)(void *kernel);
  int(ORT_CALL *GetInputCharacteristic)(const OrtCustomOp *op, size_t i);
  int(ORT_CALL *GetOutputCharacteristic)(const OrtCustomOp *op, size_t i);
  int(ORT_CALL *GetInputMemoryType)(const OrtCustomOp *op, size_t i);
  int(ORT_CALL *GetVariadicInputMinArity)(const OrtCustomOp *op);
  int(ORT_CALL *GetVariadicInputHomogeneity)(const OrtCustomOp *op);
  int(ORT_CALL *GetVariadicOutputMinArity)(const OrtCustomOp *op);
  int(ORT_CALL *GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
  OrtStatus *(ORT_CALL *CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                                        void **kernel);
  OrtStatus *(ORT_CALL *KernelComputeV2)(void *kernel, OrtKernelContext *context);
  OrtStatus *(ORT_CALL *InferOutputShapeFn)(const OrtCustomOp *op, void *context);
  int(ORT_CALL *GetStartVersion)(const OrtCustomOp *op);
  int(ORT_CALL *GetEndVersion)(const OrtCustomOp *op);
  size_t(ORT_CALL *GetMayInplace)(int **input, int **output);
  void(ORT_CALL *ReleaseMayInplace)(int *input, int *output);
  size_t(ORT_CALL *GetAliasMap)(int **input, int **output);
  void(ORT_CALL *ReleaseAliasMap)(int *input, int *output);
};

#endif
