package nri

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

const (
	digestA  = "sha256:aaaa"
	digestB  = "sha256:bbbb"
	recordID = checkpoint.ID("0123456789abcdef-20260102T150405-89abcdef")

	versionID = checkpoint.ID("fedcba9876543210-20260102T150405-89abcdef")
)

func TestDecide(t *testing.T) {
	found := func(m *checkpoint.Manifest, err error) func(*testing.T) Lookup {
		return func(*testing.T) Lookup {
			return func(checkpoint.Identity) (*checkpoint.Manifest, error) { return m, err }
		}
	}
	never := func(t *testing.T) Lookup {
		return func(i checkpoint.Identity) (*checkpoint.Manifest, error) {
			t.Errorf("the store was asked for %s", i)
			return nil, checkpoint.ErrNotFound
		}
	}
	none := found(nil, fmt.Errorf("identity: %w", checkpoint.ErrNotFound))
	record := found(&checkpoint.Manifest{ID: recordID, ImageDigest: digestA}, nil)
	corrupt := found(nil, fmt.Errorf("latest: %w", &store.CorruptError{ID: recordID, Err: fmt.Errorf("manifest is missing: %w", checkpoint.ErrCorrupt)}))
	broken := found(nil, errors.New("input/output error"))
	late := found(nil, errLate)

	noTemplate := func(t *testing.T) LookupTemplate {
		return func(namespace, name string) (*checkpoint.Manifest, error) {
			t.Errorf("the store was asked for template %s/%s", namespace, name)
			return nil, checkpoint.ErrNotFound
		}
	}
	template := func(m *checkpoint.Manifest, err error) func(*testing.T) LookupTemplate {
		return func(t *testing.T) LookupTemplate {
			return func(namespace, name string) (*checkpoint.Manifest, error) {
				if namespace != "default" || name != "shop" {
					t.Errorf("asked for template %q of %q, want shop of the pod's own namespace", name, namespace)
				}
				return m, err
			}
		}
	}
	warm := template(&checkpoint.Manifest{ID: versionID, ImageDigest: digestA}, nil)
	noWarm := template(nil, fmt.Errorf("template default/shop: %w", checkpoint.ErrNotFound))
	corruptWarm := template(nil, &store.CorruptError{ID: versionID, Err: checkpoint.ErrCorrupt})

	optedIn := map[string]string{
		checkpoint.InternalPolicy: "resume", checkpoint.InternalKey: "uid-1", checkpoint.InternalOnFailure: "cold-start",
		checkpoint.InternalTCP: "close", checkpoint.InternalImageDigest: digestA,
	}
	with := func(kv ...string) map[string]string {
		m := maps.Clone(optedIn)
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	shop := with(checkpoint.InternalPolicy, "template", checkpoint.InternalTemplate, "shop")
	named := func(m map[string]string, kv ...string) map[string]string {
		m = maps.Clone(m)
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	clone := map[string]string{checkpoint.AnnotationTemplate: "shop"}
	strictClone := map[string]string{checkpoint.AnnotationTemplate: "shop", checkpoint.AnnotationOnFailure: "fail"}
	resume := map[string]string{checkpoint.AnnotationPolicy: "resume"}
	strict := map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationOnFailure: "fail"}

	for name, tc := range map[string]struct {
		pod        map[string]string // annotations
		container  map[string]string // annotations
		uid        string
		image      *api.Image
		lookup     func(*testing.T) Lookup
		warm       func(*testing.T) LookupTemplate
		memory     checkpoint.Memory // the daemon's
		set        map[string]string
		remove     []string
		events     []string // type/code/part of the reason
		quarantine checkpoint.ID
		err        bool
	}{
		"no annotations":           {lookup: never},
		"off":                      {pod: map[string]string{checkpoint.AnnotationPolicy: "off"}, lookup: never},
		"of another container":     {pod: map[string]string{checkpoint.ContainerAnnotation(checkpoint.AnnotationPolicy, "other"): "resume"}, lookup: never},
		"container's own is off":   {pod: map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.ContainerAnnotation(checkpoint.AnnotationPolicy, "c"): "off"}, lookup: never},
		"container wrote a policy": {container: resume, lookup: never},
		"none yet":                 {pod: resume, lookup: none, set: optedIn},
		"memory of the daemon":     {pod: resume, memory: "lazy", lookup: none, set: with(checkpoint.InternalMemory, "lazy")},
		"memory of the pod": {pod: map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationMemory: "eager"}, memory: "lazy", lookup: none,
			set: with(checkpoint.InternalMemory, "eager")},
		"memory, reserved": {pod: resume, container: map[string]string{checkpoint.InternalMemory: "lazy"}, memory: "eager", lookup: none, set: with(checkpoint.InternalMemory, "eager")},
		"merge":            {pod: named(clone, checkpoint.AnnotationMerge, "true"), lookup: never, warm: warm, set: named(shop, checkpoint.InternalMerge, "true", checkpoint.InternalTemplateVersion, string(versionID))},
		"merge, reserved":  {pod: clone, container: map[string]string{checkpoint.InternalMerge: "true"}, lookup: never, warm: warm, set: named(shop, checkpoint.InternalTemplateVersion, string(versionID)), remove: []string{checkpoint.InternalMerge}},
		"merge, not valid": {pod: named(clone, checkpoint.AnnotationMerge, "maybe"), lookup: never, events: []string{"ignored/invalid/merge"}},
		"hook": {pod: map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.ContainerAnnotation(checkpoint.AnnotationAfterRestore, "c"): "exec reseed"}, lookup: none,
			set: with(checkpoint.InternalAfterRestore, "exec reseed")},
		"hook, reserved": {pod: resume, container: map[string]string{checkpoint.InternalAfterRestore: "exec evil"}, lookup: none, set: optedIn, remove: []string{checkpoint.InternalAfterRestore}},
		"bad hook": {pod: map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationAfterRestore: "signal SIGTERM"}, lookup: never,
			events: []string{"ignored/invalid/" + checkpoint.AnnotationAfterRestore}},
		"memory, off": {memory: "lazy", lookup: never},
		"settings": {
			pod: map[string]string{checkpoint.ContainerAnnotation(checkpoint.AnnotationPolicy, "c"): "reboot", checkpoint.AnnotationKey: "db-0",
				checkpoint.AnnotationOnFailure: "fail", checkpoint.AnnotationTCP: "keep"},
			lookup: none,
			set: with(checkpoint.InternalPolicy, "reboot", checkpoint.InternalKey, "db-0", checkpoint.InternalOnFailure, "fail",
				checkpoint.InternalTCP, "keep"),
		},
		"match": {pod: resume, lookup: record, set: with(checkpoint.InternalCheckpointID, string(recordID))},
		"match by config digest": {pod: resume, image: &api.Image{ConfigDigest: digestA}, lookup: record,
			set: with(checkpoint.InternalCheckpointID, string(recordID))},
		"another image": {pod: resume, image: &api.Image{Digest: digestB, ConfigDigest: digestA}, lookup: record,
			set: with(checkpoint.InternalImageDigest, digestB), events: []string{"cold-start/mismatch/" + digestA + ", the container of " + digestB}},
		"another image, strict": {pod: strict, image: &api.Image{Digest: digestB}, lookup: record,
			set: with(checkpoint.InternalImageDigest, digestB, checkpoint.InternalOnFailure, "fail", checkpoint.InternalCheckpointID, string(recordID))},
		"record without digest": {pod: resume, lookup: found(&checkpoint.Manifest{ID: recordID}, nil), set: optedIn, events: []string{"cold-start/mismatch/image"}},
		"no digest":             {pod: resume, image: &api.Image{Name: "busybox"}, lookup: never, events: []string{"ignored/unsupported/digest"}},
		"corrupt": {pod: resume, lookup: corrupt, set: optedIn, quarantine: recordID,
			events: []string{"cold-start/corrupt/manifest is missing", "quarantined/corrupt/manifest is missing"}},
		"corrupt, strict": {pod: strict, lookup: corrupt, set: with(checkpoint.InternalOnFailure, "fail", checkpoint.InternalCheckpointID, string(recordID))},
		"store broken":    {pod: resume, lookup: broken, set: optedIn, events: []string{"cold-start/internal/input/output error"}},
		"store late":      {pod: resume, lookup: late, set: optedIn, events: []string{"cold-start/timeout/in time"}},
		"store broken, strict": {pod: strict, lookup: broken, set: with(checkpoint.InternalOnFailure, "fail"), err: true,
			events: []string{"restore-failed/internal/input/output error"}},
		"to become a template": {pod: map[string]string{checkpoint.AnnotationPolicy: "template"}, lookup: never, set: with(checkpoint.InternalPolicy, "template")},
		"template":             {pod: clone, lookup: never, warm: warm, set: named(shop, checkpoint.InternalTemplateVersion, string(versionID))},
		"template of a container": {pod: map[string]string{checkpoint.AnnotationTemplate: "other", checkpoint.ContainerAnnotation(checkpoint.AnnotationTemplate, "c"): "shop"},
			lookup: never, warm: warm, set: named(shop, checkpoint.InternalTemplateVersion, string(versionID))},
		"template, off": {pod: map[string]string{checkpoint.AnnotationTemplate: "shop", checkpoint.AnnotationPolicy: "off"}, lookup: never},
		"template and own record": {pod: named(clone, checkpoint.AnnotationPolicy, "resume"), lookup: record,
			set: with(checkpoint.InternalTemplate, "shop", checkpoint.InternalCheckpointID, string(recordID))},
		"template and no own record": {pod: named(clone, checkpoint.AnnotationPolicy, "resume"), lookup: none, warm: warm,
			set: with(checkpoint.InternalTemplate, "shop", checkpoint.InternalTemplateVersion, string(versionID))},
		"template and a broken record": {pod: named(clone, checkpoint.AnnotationPolicy, "resume"), lookup: broken,
			set: with(checkpoint.InternalTemplate, "shop"), events: []string{"cold-start/internal/checkpoint: input/output error"}},
		"no such template": {pod: clone, lookup: never, warm: noWarm, set: shop, events: []string{"cold-start/missing/template default/shop"}},
		"no such template, strict": {pod: strictClone, lookup: never, warm: noWarm, set: named(shop, checkpoint.InternalOnFailure, "fail"), err: true,
			events: []string{"restore-failed/missing/template is not there"}},
		"template of another image": {pod: clone, image: &api.Image{Digest: digestB}, lookup: never, warm: warm, set: named(shop, checkpoint.InternalImageDigest, digestB),
			events: []string{"cold-start/mismatch/image: the template is of " + digestA}},
		"template of another image, strict": {pod: strictClone, image: &api.Image{Digest: digestB}, lookup: never, warm: warm,
			set: named(shop, checkpoint.InternalImageDigest, digestB, checkpoint.InternalOnFailure, "fail", checkpoint.InternalTemplateVersion, string(versionID))},
		"corrupt template": {pod: clone, lookup: never, warm: corruptWarm, set: named(shop, checkpoint.InternalTemplateVersion, string(versionID))},
		"template, late":   {pod: clone, lookup: never, warm: template(nil, errLate), set: shop, events: []string{"cold-start/timeout/look up the template"}},
		"hostile template": {pod: map[string]string{checkpoint.AnnotationTemplate: "../../etc"}, lookup: never, events: []string{"ignored/invalid/" + checkpoint.AnnotationTemplate}},
		"reserved template": {pod: clone, container: map[string]string{checkpoint.InternalTemplateVersion: "stolen"}, lookup: never, warm: noWarm, set: shop,
			remove: []string{checkpoint.InternalTemplateVersion}, events: []string{"cold-start/missing/shop"}},
		"bad policy": {pod: map[string]string{checkpoint.AnnotationPolicy: "yes"}, lookup: never, events: []string{"ignored/invalid/" + checkpoint.AnnotationPolicy}},
		"bad key":    {pod: map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationKey: "../x"}, lookup: never, events: []string{"ignored/invalid/" + checkpoint.AnnotationKey}},
		"long value": {pod: map[string]string{checkpoint.AnnotationPolicy: strings.Repeat("\x1b", 1<<16)}, lookup: never, events: []string{"ignored/invalid/65536 bytes"}},
		"bad uid":    {pod: resume, uid: "a/b", lookup: never, events: []string{"ignored/invalid/" + checkpoint.AnnotationKey}},
		"unknown annotation": {pod: map[string]string{checkpoint.AnnotationPolicy: "resume", "stasis.dev/polcy": "off", "other.dev/x": "y"}, lookup: none, set: optedIn,
			events: []string{"ignored/invalid/stasis.dev/polcy"}},
		"reserved, not opted in": {
			pod:       map[string]string{checkpoint.CRIUConfigAnnotation: "/evil", checkpoint.InternalPolicy: "resume"},
			container: map[string]string{checkpoint.InternalCheckpointID: string(recordID), "x": "y"},
			lookup:    never,
			remove:    []string{checkpoint.CRIUConfigAnnotation, checkpoint.InternalCheckpointID, checkpoint.InternalPolicy},
			events:    []string{"ignored/invalid/" + checkpoint.InternalPolicy},
		},
		"reserved, opted in": {
			pod:       resume,
			container: map[string]string{checkpoint.InternalCheckpointID: string(recordID), checkpoint.InternalKey: "stolen", checkpoint.InternalPrefix + "new": ""},
			lookup:    none,
			set:       optedIn,
			remove:    []string{checkpoint.InternalCheckpointID, checkpoint.InternalPrefix + "new"},
		},
		"reserved, overwritten": {
			pod: resume, container: map[string]string{checkpoint.InternalCheckpointID: "x"}, lookup: record,
			set: with(checkpoint.InternalCheckpointID, string(recordID)),
		},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.uid == "" {
				tc.uid = "uid-1"
			}
			if tc.warm == nil {
				tc.warm = noTemplate
			}
			if tc.image == nil {
				tc.image = &api.Image{Digest: digestA, ConfigDigest: digestB}
			}
			pod := &api.PodSandbox{Id: "sandbox", Name: "pod", Uid: tc.uid, Namespace: "default", Annotations: tc.pod}
			d := Decide(pod, &api.Container{Id: "id", Name: "c", Annotations: tc.container, Image: tc.image}, tc.memory, tc.lookup(t), tc.warm(t))
			if !maps.Equal(d.Set, tc.set) {
				t.Errorf("set %v, want %v", d.Set, tc.set)
			}
			if !slices.Equal(d.Remove, tc.remove) {
				t.Errorf("remove %v, want %v", d.Remove, tc.remove)
			}
			if d.Quarantine != tc.quarantine {
				t.Errorf("quarantine %q, want %q", d.Quarantine, tc.quarantine)
			}
			if (d.Err != nil) != tc.err {
				t.Errorf("error %v", d.Err)
			}
			if len(d.Events) != len(tc.events) {
				t.Fatalf("events %+v, want %q", d.Events, tc.events)
			}
			for i, e := range d.Events {
				want := strings.SplitN(tc.events[i], "/", 3)
				if string(e.Type) != want[0] || e.ReasonCode != want[1] || !strings.Contains(e.Reason, want[2]) {
					t.Errorf("event %+v, want %s", e, tc.events[i])
				}
				if e.ContainerID != "id" || e.SandboxID != "sandbox" || e.PodUID != tc.uid || e.PodName != "pod" || e.Identity == nil || e.Identity.Container != "c" {
					t.Errorf("event does not say of what: %+v", e)
				}
				if len(e.Reason) > maxReason+3 {
					t.Errorf("reason of %d bytes", len(e.Reason))
				}
			}
			if d.Quarantine != "" && d.Events[len(d.Events)-1].Type != event.Quarantined {
				t.Error("the last event is not about the quarantine")
			}
			a := d.Adjustment()
			if a == nil {
				if len(tc.set)+len(tc.remove) > 0 {
					t.Error("no adjustment")
				}
				return
			}
			for k := range a.Annotations {
				if name, removed := api.IsMarkedForRemoval(k); removed {
					if _, set := a.Annotations[name]; set {
						t.Errorf("%s is both set and removed", name)
					}
				}
			}
		})
	}
}

func TestTruncate(t *testing.T) {
	for in, want := range map[string]string{"short": "short", "abcdéf": "abcd...", "abcdefg": "abcde..."} {
		if got := truncate(in, 5); got != want && !(in == "abcdéf" && got == "abcd...") {
			t.Errorf("truncate(%q) = %q, want %q", in, got, want)
		}
	}
}
