/* The part of onnxruntime's C API that runs a session, beside the part for operators in plugins/onnxruntime/ort_api.h.
 *
 * Positions are those of onnxruntime_c_api.h (MIT), which only grows at its end; the tests call every one of them.
 */
#ifndef JPQ_ORT_SESSION_API_H
#define JPQ_ORT_SESSION_API_H

#include "../../onnxruntime/ort_api.h"

typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtModelMetadata OrtModelMetadata;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtTypeInfo OrtTypeInfo;

enum { ORT_LOG_ERROR = 3, ORT_ARENA_ALLOCATOR = 1, ORT_MEMORY_DEFAULT = 0 };

enum {
  SLOT_GetErrorMessage = 2,
  SLOT_CreateEnv = 3,
  SLOT_CreateSession = 7,
  SLOT_Run = 9,
  SLOT_CreateSessionOptions = 10,
  SLOT_SetIntraOpNumThreads = 24,
  SLOT_RegisterCustomOpsLibrary = 29,
  SLOT_SessionGetInputCount = 30,
  SLOT_SessionGetOutputCount = 31,
  SLOT_SessionGetOverridableInitializerCount = 32,
  SLOT_SessionGetOutputTypeInfo = 34,
  SLOT_SessionGetInputName = 36,
  SLOT_SessionGetOutputName = 37,
  SLOT_SessionGetOverridableInitializerName = 38,
  SLOT_CreateTensorWithDataAsOrtValue = 49,
  SLOT_CastTypeInfoToTensorInfo = 55,
  SLOT_CreateCpuMemoryInfo = 69,
  SLOT_AllocatorFree = 76,
  SLOT_GetAllocatorWithDefaultOptions = 78,
  SLOT_ReleaseEnv = 92,
  SLOT_ReleaseMemoryInfo = 94,
  SLOT_ReleaseSession = 95,
  SLOT_ReleaseValue = 96,
  SLOT_ReleaseTypeInfo = 98,
  SLOT_ReleaseSessionOptions = 100,
  SLOT_SessionGetModelMetadata = 111,
  SLOT_ModelMetadataLookupCustomMetadataMap = 116,
  SLOT_ReleaseModelMetadata = 118,
  SLOT_AddSessionConfigEntry = 130,
};

typedef const char *(ORT_CALL *GetErrorMessage_t)(const OrtStatus *status);
typedef OrtStatus *(ORT_CALL *CreateEnv_t)(int level, const char *log_id, OrtEnv **out);
typedef OrtStatus *(ORT_CALL *CreateSession_t)(const OrtEnv *env, const char *path, const OrtSessionOptions *options,
                                               OrtSession **out);
typedef OrtStatus *(ORT_CALL *Run_t)(OrtSession *session, const OrtRunOptions *options, const char *const *input_names,
                                     const OrtValue *const *inputs, size_t input_count, const char *const *output_names,
                                     size_t output_count, OrtValue **outputs);
typedef OrtStatus *(ORT_CALL *CreateSessionOptions_t)(OrtSessionOptions **out);
typedef OrtStatus *(ORT_CALL *SetIntraOpNumThreads_t)(OrtSessionOptions *options, int threads);
typedef OrtStatus *(ORT_CALL *RegisterCustomOpsLibrary_t)(OrtSessionOptions *options, const char *path, void **handle);
typedef OrtStatus *(ORT_CALL *SessionGetInputCount_t)(const OrtSession *session, size_t *out);
typedef OrtStatus *(ORT_CALL *SessionGetOutputCount_t)(const OrtSession *session, size_t *out);
typedef OrtStatus *(ORT_CALL *SessionGetOverridableInitializerCount_t)(const OrtSession *session, size_t *out);
typedef OrtStatus *(ORT_CALL *SessionGetOverridableInitializerName_t)(const OrtSession *session, size_t i,
                                                                      OrtAllocator *allocator, char **out);
typedef OrtStatus *(ORT_CALL *SessionGetInputName_t)(const OrtSession *session, size_t i, OrtAllocator *allocator,
                                                     char **out);
typedef OrtStatus *(ORT_CALL *SessionGetOutputName_t)(const OrtSession *session, size_t i, OrtAllocator *allocator,
                                                      char **out);
typedef OrtStatus *(ORT_CALL *SessionGetOutputTypeInfo_t)(const OrtSession *session, size_t i, OrtTypeInfo **out);
typedef OrtStatus *(ORT_CALL *CastTypeInfoToTensorInfo_t)(const OrtTypeInfo *info, const OrtTensorInfo **out);
typedef void(ORT_CALL *ReleaseTypeInfo_t)(OrtTypeInfo *info);
typedef OrtStatus *(ORT_CALL *CreateTensorWithDataAsOrtValue_t)(const OrtMemoryInfo *info, void *data, size_t bytes,
                                                                const int64_t *dims, size_t rank, int type,
                                                                OrtValue **out);
typedef OrtStatus *(ORT_CALL *CreateCpuMemoryInfo_t)(int allocator_type, int memory_type, OrtMemoryInfo **out);
typedef OrtStatus *(ORT_CALL *AllocatorFree_t)(OrtAllocator *allocator, void *memory);
typedef OrtStatus *(ORT_CALL *GetAllocatorWithDefaultOptions_t)(OrtAllocator **out);
typedef void(ORT_CALL *ReleaseEnv_t)(OrtEnv *env);
typedef void(ORT_CALL *ReleaseMemoryInfo_t)(OrtMemoryInfo *info);
typedef void(ORT_CALL *ReleaseSession_t)(OrtSession *session);
typedef void(ORT_CALL *ReleaseValue_t)(OrtValue *value);
typedef void(ORT_CALL *ReleaseSessionOptions_t)(OrtSessionOptions *options);
typedef OrtStatus *(ORT_CALL *SessionGetModelMetadata_t)(const OrtSession *session, OrtModelMetadata **out);
typedef OrtStatus *(ORT_CALL *ModelMetadataLookupCustomMetadataMap_t)(const OrtModelMetadata *metadata,
                                                                      OrtAllocator *allocator, const char *key,
                                                                      char **out);
typedef void(ORT_CALL *ReleaseModelMetadata_t)(OrtModelMetadata *metadata);
typedef OrtStatus *(ORT_CALL *AddSessionConfigEntry_t)(OrtSessionOptions *options, const char *key, const char *value);

#endif
