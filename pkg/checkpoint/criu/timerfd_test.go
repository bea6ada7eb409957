package criu

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/timerfd"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func TestRearmTimers(t *testing.T) {
	timer := func(id uint32, ticks, vsec, vnsec, isec, insec uint64) *fdinfo.FileEntry {
		e := &fdinfo.FileEntry{Type: fdinfo.FdTypes_TIMERFD.Enum(), Id: proto.Uint32(id), Tfd: &timerfd.TimerfdEntry{Id: proto.Uint32(id),
			Ticks: proto.Uint64(ticks), Vsec: proto.Uint64(vsec), Vnsec: proto.Uint64(vnsec), Isec: proto.Uint64(isec), Insec: proto.Uint64(insec)}}
		e.ProtoReflect().SetUnknown([]byte{0xf8, 0x3f, 1}) // a field of a newer CRIU
		return e
	}
	other := &fdinfo.FileEntry{Type: fdinfo.FdTypes_PIPE.Enum(), Id: proto.Uint32(9)}
	fine := []proto.Message{
		other,
		timer(1, 0, 0, 500, 1, 0), // runs
		timer(2, 3, 0, 0, 0, 0),   // expired, not periodic
		timer(3, 0, 0, 0, 1, 0),   // stopped by its program
		timer(4, 3, 0, 1, 1, 0),
	}
	images := copyImages(t)
	original := encode(t, magicFiles, fine...)
	write(t, images+"/files.img", original)
	dir := viewOf(t, images)
	if err := RearmTimers(images, dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Readlink(dir + "/files.img"); err != nil {
		t.Errorf("with nothing to do, the link is replaced: %v", err)
	}

	original = encode(t, magicFiles, append(fine, timer(5, 7, 0, 0, 1, 0), timer(6, 1, 0, 0, 0, 20), other)...)
	write(t, images+"/files.img", original)
	dir = viewOf(t, images)
	if err := RearmTimers(images, dir); err != nil {
		t.Fatal(err)
	}
	want := encode(t, magicFiles, append(fine, timer(5, 7, 0, 1, 1, 0), timer(6, 1, 0, 1, 0, 20), other)...)
	if got, err := os.ReadFile(dir + "/files.img"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("image %q, %v, want %q", got, err, want)
	}
	if st, err := os.Lstat(dir + "/files.img"); err != nil || st.Mode() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if got, _ := os.ReadFile(images + "/files.img"); !bytes.Equal(got, original) {
		t.Error("the original was changed")
	}

	write(t, images+"/files.img", original[:len(original)-1])
	if err := RearmTimers(images, viewOf(t, images)); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("damaged image: %v", err)
	}
	if err := os.Remove(images + "/files.img"); err != nil {
		t.Fatal(err)
	}
	if err := RearmTimers(images, viewOf(t, images)); err != nil {
		t.Errorf("without an image: %v", err)
	}
}
