{{- define "vllm-jd.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{- define "vllm-jd.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "vllm-jd.labels" -}}
{{ include "vllm-jd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "vllm-jd.storeClaim" -}}
{{ .Values.store.existingClaim | default (printf "%s-store" (include "vllm-jd.name" .)) }}
{{- end -}}

{{/* What the values' schema cannot say. */}}
{{- define "vllm-jd.check" -}}
{{- if not .Values.model }}
{{- fail "found no model, expected the base model: --set model=ORG/NAME, or a folder of a volume" }}
{{- end }}
{{- if and (not .Values.store.existingClaim) (not .Values.store.size) }}
{{- fail "found no store, expected store.existingClaim (a claim that holds one), or store.size for a new claim" }}
{{- end }}
{{- if and .Values.store.existingClaim .Values.store.size }}
{{- fail "found store.existingClaim and store.size, expected one of them" }}
{{- end }}
{{- if and (not .Values.apiKey.secret) (not .Values.apiKeys.secret) }}
{{- fail "found no key, and whoever reaches the service could use it; expected apiKey.secret (one key for everybody) or apiKeys.secret (a file of keys)" }}
{{- end }}
{{- if and .Values.apiKey.secret .Values.apiKeys.secret }}
{{- fail "found apiKey.secret and apiKeys.secret, expected one of them" }}
{{- end }}
{{- if and .Values.autoscaling.kind (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) }}
{{- fail (printf "found autoscaling.minReplicas %v and maxReplicas %v, expected no more of the first" .Values.autoscaling.minReplicas .Values.autoscaling.maxReplicas) }}
{{- end }}
{{- if and .Values.monitoring.serviceMonitor.enabled .Values.apiKeys.secret (not .Values.monitoring.serviceMonitor.token.secret) }}
{{- fail "found apiKeys.secret and a ServiceMonitor without a key; expected monitoring.serviceMonitor.token.secret, of a key with the right `metrics`" }}
{{- end }}
{{- end -}}
