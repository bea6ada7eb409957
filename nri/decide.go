package nri

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// Lookup finds the newest committed checkpoint of an identity. Its errors are
// those of [store.Store.Latest].
type Lookup func(checkpoint.Identity) (*checkpoint.Manifest, error)

// LookupTemplate finds the newest version of a template. Its errors are those
// of [store.Store.LatestTemplate].
type LookupTemplate func(namespace, name string) (*checkpoint.Manifest, error)

// Decision is what is to be done about one container that is being created.
type Decision struct {
	// Set are annotations of the container's OCI spec, Remove are names of
	// annotations that must not be there. No name is in both: containerd
	// applies additions and removals in no particular order.
	Set    map[string]string
	Remove []string
	// Events are for the node's log.
	Events []event.Event
	// Quarantine names a damaged record that is to be set aside; the reason is
	// in the event of type [event.Quarantined] that is the last of Events.
	Quarantine checkpoint.ID
	// Err, where not nil, must fail the creation of the container.
	Err error
}

// Adjustment is the decision in the runtime's form, nil where there is nothing
// to change.
func (d Decision) Adjustment() *api.ContainerAdjustment {
	if len(d.Set) == 0 && len(d.Remove) == 0 {
		return nil
	}
	a := new(api.ContainerAdjustment)
	for k, v := range d.Set {
		a.AddAnnotation(k, v)
	}
	for _, k := range d.Remove {
		a.RemoveAnnotation(k)
	}
	return a
}

// Decide resolves the pod's annotations for one of its containers and looks for
// its checkpoint, and where there is none for the template that it names. It
// has no effects of its own. The memory is for pods that do not say.
func Decide(pod *api.PodSandbox, c *api.Container, memory checkpoint.Memory, lookup Lookup, template LookupTemplate) Decision {
	d := decide(pod, c, memory, lookup, template)
	// Pod annotations may reach the container's spec too, where the runtime
	// handler passes them on.
	for _, from := range []map[string]string{c.GetAnnotations(), pod.GetAnnotations()} {
		for k := range from {
			if _, set := d.Set[k]; checkpoint.Reserved(k) && !set && !slices.Contains(d.Remove, k) {
				d.Remove = append(d.Remove, k)
			}
		}
	}
	slices.Sort(d.Remove)
	for i := range d.Events {
		e := &d.Events[i]
		e.PodName, e.PodUID, e.SandboxID, e.ContainerID = pod.GetName(), pod.GetUid(), pod.GetId(), c.GetId()
		e.Reason = truncate(e.Reason, maxReason)
	}
	return d
}

func decide(pod *api.PodSandbox, c *api.Container, memory checkpoint.Memory, lookup Lookup, template LookupTemplate) (d Decision) {
	identity := identityOf(pod, c.GetName(), checkpoint.Settings{})
	tell := func(t event.Type, id checkpoint.ID, code string, err error) {
		i := identity
		d.Events = append(d.Events, event.Event{Type: t, Identity: &i, CheckpointID: id, ReasonCode: code, Reason: err.Error()})
	}
	for _, name := range unknownAnnotations(pod.GetAnnotations()) {
		tell(event.Ignored, "", "invalid", fmt.Errorf("annotation %s of the pod: unknown or reserved", printable(name)))
	}
	settings, err := checkpoint.ParseSettings(pod.GetAnnotations(), c.GetName())
	if err != nil {
		tell(event.Ignored, "", "invalid", err)
		return d
	}
	if !settings.OptedIn() {
		return d
	}
	identity = identityOf(pod, c.GetName(), settings)
	if err := checkpoint.ValidateKey(identity.Key); err != nil { // the pod's UID: an annotation was checked
		tell(event.Ignored, "", "invalid", fmt.Errorf("uid of the pod, set %s: %w", checkpoint.AnnotationKey, err))
		return d
	}
	if err := identity.Validate(); err != nil {
		tell(event.Ignored, "", "invalid", err)
		return d
	}
	digest := c.GetImage().GetDigest()
	if digest == "" {
		digest = c.GetImage().GetConfigDigest()
	}
	if digest == "" {
		tell(event.Ignored, "", "unsupported", errors.New("the runtime does not tell the digest of the container's image; containerd 2.4 and later do"))
		return d
	}
	d.Set = map[string]string{
		checkpoint.InternalPolicy:      string(settings.Policy),
		checkpoint.InternalKey:         identity.Key,
		checkpoint.InternalOnFailure:   string(settings.OnFailure),
		checkpoint.InternalTCP:         string(settings.TCP),
		checkpoint.InternalImageDigest: digest,
	}
	if m := cmp.Or(settings.Memory, memory); m != "" {
		d.Set[checkpoint.InternalMemory] = string(m)
	}
	if settings.Template != "" {
		d.Set[checkpoint.InternalTemplate] = settings.Template
	}
	if settings.Merge {
		d.Set[checkpoint.InternalMerge] = "true"
	}
	if settings.AfterRestore != "" {
		d.Set[checkpoint.InternalAfterRestore] = settings.AfterRestore
	}
	strict := settings.OnFailure == checkpoint.OnFailureFail
	source, internal := "checkpoint", checkpoint.InternalCheckpointID
	m, err := (*checkpoint.Manifest)(nil), error(checkpoint.ErrNotFound)
	if settings.KeepsRecords() {
		m, err = lookup(identity)
	}
	if errors.Is(err, checkpoint.ErrNotFound) && settings.Template != "" {
		source, internal = "template", checkpoint.InternalTemplateVersion
		m, err = template(identity.Namespace, settings.Template)
	}
	fail := func(what string) {
		d.Err = fmt.Errorf("container %q of pod %s/%s: %s is %s and its %s %s: %w",
			c.GetName(), pod.GetNamespace(), pod.GetName(), checkpoint.AnnotationOnFailure, settings.OnFailure, source, what, err)
		tell(event.RestoreFail, "", lookupCode(err), d.Err)
	}
	var corrupt *store.CorruptError
	switch {
	case errors.Is(err, checkpoint.ErrNotFound) && settings.Template == "":
	case errors.Is(err, checkpoint.ErrNotFound) && strict:
		fail("is not there")
	case errors.Is(err, checkpoint.ErrNotFound):
		tell(event.ColdStart, "", "missing", err)
	case errors.As(err, &corrupt) && (strict || source == "template"):
		// The shim refuses it for what it is, and sets it aside.
		d.Set[internal] = string(corrupt.ID)
	case errors.As(err, &corrupt):
		d.Quarantine = corrupt.ID
		tell(event.ColdStart, corrupt.ID, "corrupt", err)
		tell(event.Quarantined, corrupt.ID, "corrupt", err)
	case err != nil && strict:
		fail("could not be looked up")
	case err != nil:
		tell(event.ColdStart, "", lookupCode(err), fmt.Errorf("look up the %s: %w", source, err))
	case m.ImageDigest == digest || strict: // the shim compares again, and refuses
		d.Set[internal] = string(m.ID)
	default:
		tell(event.ColdStart, m.ID, "mismatch", fmt.Errorf("image: the %s is of %s, the container of %s", source, m.ImageDigest, digest))
	}
	return d
}

func lookupCode(err error) string {
	switch {
	case errors.Is(err, errLate):
		return "timeout"
	case errors.Is(err, checkpoint.ErrBusy):
		return "busy"
	case errors.Is(err, checkpoint.ErrNotFound):
		return "missing"
	}
	return "internal"
}

// unknownAnnotations lists the names of our name space that mean nothing,
// sorted: a typing error there would otherwise go unseen.
func unknownAnnotations(annotations map[string]string) []string {
	var unknown []string
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		if checkpoint.Ours(name) && !checkpoint.Known(name) {
			unknown = append(unknown, name)
		}
	}
	return unknown
}

// maxReason bounds, in bytes, what a pod's author can put into the node's log.
const maxReason = 512

func printable(s string) string { return truncate(strings.Trim(fmt.Sprintf("%q", s), `"`), 128) }

func truncate(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit] + "..."
}
