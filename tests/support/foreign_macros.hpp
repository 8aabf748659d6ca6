#pragma once

// What a program may have defined before it includes us (headers.cmake): Qt's words, Windows', X11's, Apple's.

#define emit
#define forever for (;;)
#define signals public
#define slots

#define CONST const
#define DELETE 0x00010000L
#define ERROR 0
#define IN
#define OPTIONAL
#define OUT
#define far
#define interface struct
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define near
#define small char

#define Always 2
#define Bool int
#define Complex 0
#define False 0
#define None 0L
#define Status int
#define Success 0
#define True 1

#define check(assertion)
#define require(assertion, label)
#define verify(assertion)
