package checkpoint

import (
	"fmt"
	"strings"
	"time"
)

// Prefix is the name space of all annotations of stasis.
const Prefix = "stasis.dev/"

// Annotations that a user writes on a pod. Each may be narrowed to one
// container, see [ContainerAnnotation].
const (
	// AnnotationPolicy says when a container is dumped and restored: see [Policy].
	AnnotationPolicy = Prefix + "policy"
	// AnnotationKey is a stable identity within the namespace, for pods whose
	// UID changes. Default: the pod's UID. See [ValidateKey].
	AnnotationKey = Prefix + "key"
	// AnnotationOnFailure says what happens when a restore cannot work: see [OnFailure].
	AnnotationOnFailure = Prefix + "on-failure"
	// AnnotationTCP says what becomes of established TCP connections: see [TCP].
	AnnotationTCP = Prefix + "tcp"
	// AnnotationTemplate names the template, of the pod's own namespace, that a
	// container begins from. See [ValidateTemplateName].
	AnnotationTemplate = Prefix + "template"
	// AnnotationMemory says when a restore brings memory back: see [Memory].
	// Default: what the daemon was told.
	AnnotationMemory = Prefix + "memory"
	// AnnotationPromoteAfter is how long a container that began cold must have run
	// before it becomes the template that it names, where there is none: a duration
	// such as "90s", [MinPromoteAfter] to [MaxPromoteAfter].
	AnnotationPromoteAfter = Prefix + "promote-after"
	// AnnotationMerge, "true" or "false", says whether a container that begins
	// from a template offers its memory to the kernel for merging with equal
	// memory of others (KSM). Default: "false".
	AnnotationMerge = Prefix + "merge"
	// AnnotationAfterRestore is what is done in the container after each restore,
	// from a checkpoint or from a template, before it counts as started: see [ParseHook].
	AnnotationAfterRestore = Prefix + "after-restore"
)

// Bounds of [AnnotationPromoteAfter].
const (
	MinPromoteAfter = time.Second
	MaxPromoteAfter = 24 * time.Hour
)

// ContainerAnnotation is the form of an annotation that holds for one container
// of the pod: "policy.stasis.dev/container.NAME" for "stasis.dev/policy". It is
// the convention of NRI plugins; a second slash, as in
// "stasis.dev/policy/container.NAME", is not a name that Kubernetes accepts. By
// its rules NAME has at most 53 bytes.
func ContainerAnnotation(name, container string) string {
	return strings.TrimPrefix(name, Prefix) + containerInfix + container
}

// containerInfix stands between the annotation's own name and the container's.
const containerInfix = "." + Prefix + "container."

// Known reports whether a user may write the annotation, for a pod or for one
// container. Names that are not of this module are not known.
func Known(name string) bool {
	if own, _, ok := strings.Cut(name, containerInfix); ok {
		name = Prefix + own
	}
	switch name {
	case AnnotationPolicy, AnnotationKey, AnnotationOnFailure, AnnotationTCP, AnnotationTemplate, AnnotationMemory, AnnotationPromoteAfter, AnnotationMerge, AnnotationAfterRestore:
		return true
	}
	return false
}

// Ours reports whether an annotation is of the name space of stasis.
func Ours(name string) bool {
	return strings.HasPrefix(name, Prefix) || strings.Contains(name, "."+Prefix)
}

// Annotations that containerd's CRI plugin writes into the OCI spec of a
// container (internal/cri/annotations).
const (
	CRISandboxNamespace = "io.kubernetes.cri.sandbox-namespace"
	CRISandboxName      = "io.kubernetes.cri.sandbox-name"
	CRISandboxUID       = "io.kubernetes.cri.sandbox-uid"
	CRISandboxID        = "io.kubernetes.cri.sandbox-id"
	CRIContainerName    = "io.kubernetes.cri.container-name"
	CRIImageName        = "io.kubernetes.cri.image-name"
)

// Annotations that only the daemon writes, into the OCI spec of a container.
// Whatever a user put there is removed or overwritten.
const (
	// InternalPrefix is the reserved part of the name space.
	InternalPrefix = Prefix + "internal."
	// InternalPolicy is the resolved [Policy]; its presence makes the shim
	// treat the container as opted in.
	InternalPolicy = InternalPrefix + "policy"
	// InternalKey is the resolved key.
	InternalKey = InternalPrefix + "key"
	// InternalOnFailure is the resolved [OnFailure].
	InternalOnFailure = InternalPrefix + "on-failure"
	// InternalTCP is the resolved [TCP].
	InternalTCP = InternalPrefix + "tcp"
	// InternalMemory is the resolved [Memory]; where it is absent memory is eager.
	InternalMemory = InternalPrefix + "memory"
	// InternalAfterRestore is the hook, as the user wrote it and [ParseHook] reads
	// it; absent for none.
	InternalAfterRestore = InternalPrefix + "after-restore"
	// InternalImageDigest is the digest of the container's OCI image.
	InternalImageDigest = InternalPrefix + "image-digest"
	// InternalCheckpointID names the checkpoint that the daemon found for the
	// container; the shim looks it up in its own store and checks it again.
	InternalCheckpointID = InternalPrefix + "checkpoint-id"
	// InternalTemplate is the resolved name of the template.
	InternalTemplate = InternalPrefix + "template"
	// InternalMerge is "true" where [AnnotationMerge] is, and absent else.
	InternalMerge = InternalPrefix + "merge"
	// InternalTemplateVersion is the version of the template that the daemon
	// found. Never beside InternalCheckpointID.
	InternalTemplateVersion = InternalPrefix + "template-version"
)

// CRIUConfigAnnotation makes runc hand a configuration file to CRIU
// (runc, libcontainer/criu_linux.go, handleCriuConfigurationFile). Only the
// shim may set it: options there override everything else.
const CRIUConfigAnnotation = "org.criu.config"

// MaxAnnotationBytes bounds the value of an annotation of ours.
const MaxAnnotationBytes = 256

// Policy says when a container is dumped and restored.
type Policy string

const (
	// PolicyOff leaves the container alone.
	PolicyOff Policy = "off"
	// PolicyResume dumps at each stop and restores at the next create of the
	// same identity.
	PolicyResume Policy = "resume"
	// PolicyReboot dumps only while the node is being prepared for a reboot.
	PolicyReboot Policy = "reboot"
	// PolicyTemplate never dumps by itself: the container may become a template,
	// and may begin from one. It is the default where a template is named.
	PolicyTemplate Policy = "template"
)

// OnFailure says what happens when a restore cannot work.
type OnFailure string

const (
	// OnFailureColdStart starts the container as if there were no checkpoint.
	OnFailureColdStart OnFailure = "cold-start"
	// OnFailureFail lets the start of the container fail.
	OnFailureFail OnFailure = "fail"
)

// TCP says what becomes of established TCP connections.
type TCP string

const (
	// TCPClose restores established connections as closed sockets.
	TCPClose TCP = "close"
	// TCPKeep restores established connections; it needs an unchanged address.
	TCPKeep TCP = "keep"
)

// Memory says when a restore brings memory back.
type Memory string

const (
	// MemoryLazy fills memory while the tasks run, where that is possible and
	// worth it.
	MemoryLazy Memory = "lazy"
	// MemoryEager fills all memory before the tasks run.
	MemoryEager Memory = "eager"
	// MemoryMapped maps memory from the template that a Java virtual machine begins
	// from, so that clones share what they do not write to; where that is not
	// possible it is lazy.
	MemoryMapped Memory = "mapped"
)

// Validate refuses what is none of them; empty is none.
func (m Memory) Validate() error {
	switch m {
	case MemoryLazy, MemoryEager, MemoryMapped:
		return nil
	}
	return fmt.Errorf("unknown value %q, want lazy, eager or mapped: %w", string(m), ErrInvalid)
}

// Settings are the annotations of one container, resolved.
type Settings struct {
	Policy    Policy    `json:"policy"`
	Key       string    `json:"key,omitempty"`
	OnFailure OnFailure `json:"onFailure,omitempty"`
	TCP       TCP       `json:"tcp,omitempty"`
	Memory    Memory    `json:"memory,omitempty"` // empty where the pod does not say
	// Template is the name of the template to begin from, empty for none.
	Template string `json:"template,omitempty"`
	// PromoteAfter is how long the container runs before it may become that
	// template, 0 for never. Only the daemon knows it.
	PromoteAfter time.Duration `json:"promoteAfter,omitempty"`
	// Merge: memory that comes from the template is offered for merging.
	Merge bool `json:"merge,omitempty"`
	// AfterRestore is the hook after a restore, which [ParseHook] accepts; empty
	// for none.
	AfterRestore string `json:"afterRestore,omitempty"`
}

// OptedIn reports whether stasis acts on the container at all.
func (s Settings) OptedIn() bool {
	return s.Policy == PolicyTemplate || s.KeepsRecords()
}

// KeepsRecords reports whether the container leaves checkpoints of its own, and
// goes on from them.
func (s Settings) KeepsRecords() bool { return s.Policy == PolicyResume || s.Policy == PolicyReboot }

// ParseSettings resolves the user's annotations of a pod for one container.
// A container's own form wins over the pod's. An absent policy means off, or
// template where a template is named. On
// an unknown or oversized value it returns an error wrapping [ErrInvalid] that
// names the annotation, and settings that leave the container alone.
func ParseSettings(annotations map[string]string, container string) (Settings, error) {
	off := Settings{Policy: PolicyOff}
	get := func(name string) (string, error) {
		key := ContainerAnnotation(name, container)
		v, ok := annotations[key]
		if !ok {
			key = name
			v = annotations[key]
		}
		if len(v) > MaxAnnotationBytes {
			return "", fmt.Errorf("annotation %s: %d bytes, at most %d are allowed: %w", name, len(v), MaxAnnotationBytes, ErrInvalid)
		}
		return v, nil
	}
	s := Settings{Policy: PolicyOff, OnFailure: OnFailureColdStart, TCP: TCPClose}
	v, err := get(AnnotationPolicy)
	if err != nil {
		return off, err
	}
	if s.Template, err = get(AnnotationTemplate); err != nil {
		return off, err
	}
	switch p := Policy(v); {
	case p == "" && s.Template != "":
		s.Policy = PolicyTemplate
	case p == "", p == PolicyOff:
		return off, nil
	case p == PolicyResume, p == PolicyReboot, p == PolicyTemplate:
		s.Policy = p
	default:
		return off, fmt.Errorf("annotation %s: unknown value %q, want resume, reboot, template or off: %w", AnnotationPolicy, v, ErrInvalid)
	}
	if s.Template != "" {
		if err := ValidateTemplateName(s.Template); err != nil {
			return off, fmt.Errorf("annotation %s: %w", AnnotationTemplate, err)
		}
	}
	if v, err = get(AnnotationOnFailure); err != nil {
		return off, err
	}
	switch f := OnFailure(v); f {
	case "":
	case OnFailureColdStart, OnFailureFail:
		s.OnFailure = f
	default:
		return off, fmt.Errorf("annotation %s: unknown value %q, want cold-start or fail: %w", AnnotationOnFailure, v, ErrInvalid)
	}
	if v, err = get(AnnotationTCP); err != nil {
		return off, err
	}
	switch t := TCP(v); t {
	case "":
	case TCPClose, TCPKeep:
		s.TCP = t
	default:
		return off, fmt.Errorf("annotation %s: unknown value %q, want close or keep: %w", AnnotationTCP, v, ErrInvalid)
	}
	if v, err = get(AnnotationMemory); err != nil {
		return off, err
	}
	if s.Memory = Memory(v); v != "" {
		if err := s.Memory.Validate(); err != nil {
			return off, fmt.Errorf("annotation %s: %w", AnnotationMemory, err)
		}
	}
	if v, err = get(AnnotationPromoteAfter); err != nil {
		return off, err
	}
	if v != "" {
		d, err := time.ParseDuration(v)
		switch {
		case err != nil || d < MinPromoteAfter || d > MaxPromoteAfter:
			return off, fmt.Errorf("annotation %s: %q, want a duration of %v to %v: %w", AnnotationPromoteAfter, v, MinPromoteAfter, MaxPromoteAfter, ErrInvalid)
		case s.Template == "":
			return off, fmt.Errorf("annotation %s: %s names no template: %w", AnnotationPromoteAfter, AnnotationTemplate, ErrInvalid)
		}
		s.PromoteAfter = d
	}
	if v, err = get(AnnotationMerge); err != nil {
		return off, err
	}
	switch {
	case v == "", v == "false":
	case v != "true":
		return off, fmt.Errorf("annotation %s: unknown value %q, want true or false: %w", AnnotationMerge, v, ErrInvalid)
	case s.Template == "":
		return off, fmt.Errorf("annotation %s: %s names no template: %w", AnnotationMerge, AnnotationTemplate, ErrInvalid)
	default:
		s.Merge = true
	}
	if s.AfterRestore, err = get(AnnotationAfterRestore); err != nil {
		return off, err
	}
	if s.AfterRestore != "" {
		if _, err := ParseHook(s.AfterRestore); err != nil {
			return off, fmt.Errorf("annotation %s: %w", AnnotationAfterRestore, err)
		}
	}
	if s.Key, err = get(AnnotationKey); err != nil {
		return off, err
	}
	if s.Key != "" {
		if err := ValidateKey(s.Key); err != nil {
			return off, fmt.Errorf("annotation %s: %w", AnnotationKey, err)
		}
	}
	return s, nil
}

// ValidateKey checks a key: 1 to 128 of a-z, A-Z, 0-9, '.', '_', '-', beginning
// with a letter or digit and without "..", so that it is harmless wherever it
// is printed.
func ValidateKey(key string) error {
	if key == "" || len(key) > 128 {
		return fmt.Errorf("key of %d bytes, want 1 to 128: %w", len(key), ErrInvalid)
	}
	for i, c := range []byte(key) {
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '.' && c != '_' && c != '-') {
			return fmt.Errorf("key %q: want letters, digits, '.', '_' or '-': %w", key, ErrInvalid)
		}
	}
	if strings.Contains(key, "..") {
		return fmt.Errorf("key %q contains \"..\": %w", key, ErrInvalid)
	}
	return nil
}

// ValidateTemplateName checks the name of a template: a DNS label, as names of
// namespaces are.
func ValidateTemplateName(name string) error {
	if name == "" || len(name) > 63 {
		return fmt.Errorf("name of %d bytes, want 1 to 63: %w", len(name), ErrInvalid)
	}
	for i, c := range []byte(name) {
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (c != '-' || i == 0 || i == len(name)-1) {
			return fmt.Errorf("name %q: want lower-case letters, digits and, inside, '-': %w", name, ErrInvalid)
		}
	}
	return nil
}

// Reserved reports whether an annotation may be set by stasis only.
func Reserved(name string) bool {
	return strings.HasPrefix(name, InternalPrefix) || name == CRIUConfigAnnotation
}
